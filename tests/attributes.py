"""Which attributes of other libraries change, seen from a second thread."""

import contextlib
import importlib
import pkgutil
import sys
import threading
import types

WATCHED = (
    *("keras", "keras_hub", "optax", "torch.optim", "torch.nn.functional"),
    *("tensorflow.python.ops.random_ops", "builtins", "importlib", "inspect"),
    *("random", "threading", "types"),
)
# What Keras and Python change by themselves, with the reason.
OWN = {
    # Of each call of `warnings.warn`.
    "__warningregistry__",
    # Keras counts names, and keeps its seeds and scopes there.
    "GLOBAL_STATE_TRACKER",
    "GLOBAL_SETTINGS_TRACKER",
    # Of classes, when a check of types asks for them.
    "__abstractmethods__",
    "_abc_impl",
    "__annotations__",
    "__annotations_cache__",
    "__doc__",
    "__static_attributes__",
}


def owners():
    """Return {name: dict} of the attributes of modules and their classes."""
    found = {}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or not any(
            name == each or name.startswith(f"{each}.") for each in WATCHED
        ):
            continue
        found[name] = vars(module)
        for key, value in list(vars(module).items()):
            if isinstance(value, type) and value.__module__ == name:
                found[f"{name}.{key}"] = vars(value)
    return found


def shadowed(model):
    """Return the methods that a model and its layers have as their own.

    A set of pairs of an object's id and a name; Keras has some by itself.
    """
    return {
        (id(part), name)
        for part in [model, *model._flatten_layers(include_self=False)]
        for name in list(vars(part))
        if callable(getattr(type(part), name, None))
    }


class Snapshot:
    """The attributes of all `owners`, and the finders of imports."""

    def __init__(self):
        self.owners = owners()
        self.values = {name: dict(own) for name, own in self.owners.items()}
        self.finders = list(sys.meta_path)
        self.trace = sys.gettrace(), sys.getprofile(), sys.excepthook
        self.models = []

    def add(self, model):
        """Have an eye on a user's model as well."""
        self.models.append((model, type(model), shadowed(model)))
        return model

    def changes(self):
        """Return the names of what is not as it was, a set."""
        found = set()
        if sys.meta_path != self.finders:
            found.add("sys.meta_path")
        if (sys.gettrace(), sys.getprofile(), sys.excepthook) != self.trace:
            found.add("the hooks of the interpreter")
        for name, before in self.values.items():
            now = self.owners[name]
            for key, value in before.items():
                if key not in OWN and now.get(key) is not value:
                    found.add(f"{name}.{key}")
            if len(now) > len(before):
                found.update(
                    f"{name}.{key}"
                    for key in list(now)
                    if key not in before and not _may_come(name, key, now)
                )
        for model, cls, before in list(self.models):
            if type(model) is not cls:
                found.add(f"the class of {cls.__name__}")
            found.update(name for _, name in shadowed(model) - before)
        return found


def _may_come(name, key, now):
    """Whether a new attribute is a module that was imported meanwhile."""
    is_module = isinstance(now.get(key), types.ModuleType)
    return key in OWN or is_module or key.startswith("__")


def import_all(package):
    """Import the public modules of a package, so that none comes later."""
    root = importlib.import_module(package)
    for each in pkgutil.iter_modules(root.__path__, f"{package}."):
        with contextlib.suppress(ImportError):
            importlib.import_module(each.name)


@contextlib.contextmanager
def watched():
    """Yield a `Snapshot` and a set with the names of what changes in a scope.

    A second thread looks all the time; once more at the end.
    """
    snapshot, found, is_over = Snapshot(), set(), threading.Event()

    def look():
        while not is_over.wait(0.001):
            found.update(snapshot.changes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield snapshot, found
    finally:
        is_over.set()
        thread.join()
        found.update(snapshot.changes())
