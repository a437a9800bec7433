"""Which attributes of other libraries change, seen from a second thread."""

import contextlib
import importlib
import operator
import pkgutil
import sys
import threading
import time
import types

WATCHED = (
    *("keras", "keras_hub", "optax", "torch.optim", "torch.nn.functional"),
    *("tensorflow.python.ops.random_ops", "builtins", "importlib", "inspect"),
    *("random", "threading", "types"),
)
# What Keras and Python change by themselves, with the reason.
OWN = {
    # Each call of `warnings.warn` sets it.
    "__warningregistry__",
    # Keras counts names, and keeps its seeds and scopes there.
    "GLOBAL_STATE_TRACKER",
    "GLOBAL_SETTINGS_TRACKER",
    # Classes get these when types are checked.
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
    """The attributes of all `owners`, and the finders of imports.

    Attributes:
        looks: Int, how often the second thread looked.
    """

    def __init__(self):
        self.before = {
            name: (own, dict(own), list(own.values()))
            for name, own in owners().items()
        }
        self.finders = list(sys.meta_path)
        self.trace = sys.gettrace(), sys.getprofile(), sys.excepthook
        self.models = []
        self.looks = 0

    def add(self, model):
        """Have an eye on a user's model as well."""
        layers = [(x, type(x)) for x in model._flatten_layers()]
        self.models.append((model, type(model), layers, shadowed(model)))
        return model

    def changes(self):
        """Return the names of what is not as it was, a set."""
        found = set()
        if sys.meta_path != self.finders:
            found.add("sys.meta_path")
        if (sys.gettrace(), sys.getprofile(), sys.excepthook) != self.trace:
            found.add("the hooks of the interpreter")
        for name, (own, before, values) in self.before.items():
            # All at once, in C: by names only what is not the same objects.
            if len(own) != len(values) or not all(
                map(operator.is_, own.values(), values)
            ):
                found |= {f"{name}.{key}" for key in _changed(own, before)}
        for model, cls, layers, before in list(self.models):
            if type(model) is not cls:
                found.add(f"the class of {cls.__name__}")
            # A reparameterized layer is of a subclass.
            for layer, each in layers:
                if not isinstance(layer, each):
                    found.add(f"the class of a {each.__name__}")
            found.update(name for _, name in shadowed(model) - before)
        return found


def _changed(own, before):
    """Return the keys of a dict that are not as they were, or new."""
    now = dict(own)
    gone = {key for key in before if now.get(key, now) is not before[key]}
    come = {k for k in now if k not in before and not _may_come(k, now[k])}
    return (gone | come) - OWN


def _may_come(key, value):
    """Whether a new attribute is a module that was imported meanwhile."""
    return isinstance(value, types.ModuleType) or key.startswith("__")


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
        pause = 0.0
        while not is_over.wait(pause):
            start = time.thread_time()
            found.update(snapshot.changes())
            snapshot.looks += 1
            # A fifth of one core: without a pause it would take all.
            pause = 4 * (time.thread_time() - start)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield snapshot, found
    finally:
        is_over.set()
        thread.join()
        found.update(snapshot.changes())
