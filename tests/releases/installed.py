"""Checks the package where it is installed, as those who install it have it.

    python -m tests.releases.installed [--no-compiler]

Run by `make wheel` and `make sdist`, with the Python of a new environment.
"""

import argparse
import pathlib
import shutil
import sys
import sysconfig

COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang", "nvcc")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--no-compiler", action="store_true")
    args = parser.parse_args()
    compilers = [name for name in COMPILERS if shutil.which(name)]
    assert not (args.no_compiler and compilers), compilers

    here = pathlib.Path(sys.prefix).resolve()
    # The first is the working folder, with the tests.
    packages = [path for path in sys.path[1:] if "site-packages" in path]
    assert packages == [sysconfig.get_path("purelib")], packages

    import keras_weightmods
    from keras_weightmods.ops.sparse_matmul import reason_for_dense

    package = pathlib.Path(keras_weightmods.__file__).resolve()
    assert package.is_relative_to(here), package
    assert not reason_for_dense(), reason_for_dense()
    print(f"keras_weightmods {keras_weightmods.__version__}: {package.parent}")
    print("kernels:", *package.parent.rglob("kwm_native.*"))


if __name__ == "__main__":
    main()
