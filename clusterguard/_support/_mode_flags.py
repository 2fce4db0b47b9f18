"""Train and eval mode of modules, switched through their own methods and one by one."""

from collections.abc import Collection

from clusterguard.errors import ConfigurationError, in_one_line
from torch import nn


def to_eval_mode(module: nn.Module) -> None:
    """Put a module and all its submodules into eval mode permanently."""
    set_mode(dict.fromkeys(module.modules()), training=False)


def names_in_eval_mode(module: nn.Module) -> frozenset[str]:
    """The names of those submodules that are in eval mode, as `named_modules` gives them."""
    return frozenset(name for name, part in module.named_modules() if not part.training)


def set_mode(modules: Collection[nn.Module], *, training: bool) -> None:
    """Switch the given modules through their own methods, parents first. Other submodules keep their mode.

    Raises:
        ConfigurationError: a module's own `train` or `eval` raises an error.
    """
    for module in modules:
        if module.training == training:
            continue
        if overrides_mode_methods(module):
            before = {part: part.training for part in module.modules() if part not in modules}
            switch(module, training=training)
            set_mode({part for part, mode in before.items() if part.training != mode}, training=not training)
        module.training = training  # the module's own method may have left the flag as it was


def switch(module: nn.Module, *, training: bool) -> None:
    """Call the module's own `train` or `eval`.

    Raises:
        ConfigurationError: it raises an error of another kind.
    """
    try:
        module.train() if training else module.eval()
    except ConfigurationError:
        raise
    except Exception as error:  # a method of the user's may raise anything
        name = "train" if training else "eval"
        raise ConfigurationError(
            f"expected a module whose train() and eval() can be called, got {type(module).__name__}, whose {name}() "
            f"raised {in_one_line(error)}; let it switch its layers"
        ) from error


def overrides_mode_methods(module: nn.Module) -> bool:
    """Whether a module overrides `train` or `eval`, which may then do more than set flags."""
    train, evaluate = (getattr(method, "__func__", None) for method in (module.train, module.eval))
    only_flags = train is nn.Module.train or hasattr(train, "only_sets_flags")
    return not only_flags or evaluate is not nn.Module.eval
