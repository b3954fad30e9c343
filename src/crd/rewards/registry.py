"""Names of the bundled rewards, and how a name or `module.path:function` becomes a callable."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from crd.errors import CRDError, not_ours, one_line
from crd.rewards.abilities import Named

# A new reward is one file and one line here. Strings, so that its libraries load only when it is asked for.
REGISTRY: dict[str, str] = {
    "ocr": "crd.rewards.ocr:OCRReward",
    "geneval": "crd.rewards.geneval:GenEvalReward",
    "geneval-official": "crd.rewards.geneval:GenEvalOfficialReward",
    "geneval-tiny": "crd.rewards.geneval:TinyGenEvalReward",
    "geneval-tiny-official": "crd.rewards.geneval:TinyGenEvalOfficialReward",
    # The held-out detector of the bundled world: other architecture, seed and data than the one above.
    "geneval-tiny-held-out": "crd.rewards.geneval:TinyHeldOutGenEvalReward",
    # Other judges of the bundled world that nothing is trained on.
    "ocr-easyocr": "crd.metrics.ocr_easyocr:EasyOCRScore",
    "tiny-image-text": "crd.metrics.tiny_image_text:TinyImageText",
    # Preference scorers; each may be given its weights as NAME=SOURCE.
    "clipscore": "crd.metrics.clipscore:CLIPScore",
    "pickscore": "crd.metrics.pickscore:PickScore",
    "hpsv2": "crd.metrics.hpsv2:HPSv2",
    "imagereward": "crd.metrics.imagereward:ImageReward",
    "aesthetic": "crd.metrics.aesthetic:AestheticScore",
    "vlm": "crd.metrics.vlm_judge:VLMJudge",
    "jpeg-compressibility": "crd.rewards.jpeg:jpeg_compressibility",
    "jpeg-incompressibility": "crd.rewards.jpeg:jpeg_incompressibility",
    # remote=SOURCE#NAME: the reward NAME of servers started with `crd serve-reward`.
    "remote": "crd.rewards.remote:RemoteReward",
}


def resolve(reward: str | Callable[..., Any]) -> Callable[..., Any]:
    """The callable that a reward's name stands for; a callable stands for itself.

    Args:
        reward: a registered name (`"ocr"`), `"module.path:function"` (the working directory is searched
            last), or a callable. A class, named or given, is called without arguments, that
            of `"NAME=SOURCE"` with `source=SOURCE`: the hub id, folder or file of its weights or settings.

    Raises:
        CRDError: unknown name (lists the names and the nearest), module or attribute not found, not callable, or a
            SOURCE for what takes none.
    """
    name, equals, source = reward.partition("=") if isinstance(reward, str) else ("", "", "")
    if isinstance(reward, str):
        path = REGISTRY.get(name, name)
        if ":" not in path:
            raise CRDError(_unknown(name))
        found = _import(path)
    else:
        found = reward
    if equals and not source:
        raise CRDError(f"reward {reward!r} names no source after the =; add it, or leave out the =")
    if equals and not (inspect.isclass(found) and "source" in inspect.signature(found).parameters):
        raise CRDError(f"reward {name} takes no source, got {source!r}; leave out the = and what follows")
    if inspect.isclass(found):
        build: Callable[..., Any] = found
        with not_ours(f"making reward {reward!r}", "a class is called without arguments, or with source= alone"):
            found = build(source=source) if equals else build()
    if not callable(found):
        raise CRDError(f"reward {reward!r} must be callable, got {type(found).__name__}; give a function")
    return found


def reward_name(reward: str | Callable[..., Any], resolved: Callable[..., Any]) -> str:
    """The name under which scores are logged: its own, else the registered one, else that of the function or class."""
    if isinstance(resolved, Named):
        return resolved.reward_name
    if isinstance(reward, str) and reward.partition("=")[0] in REGISTRY:
        return reward.partition("=")[0]
    if inspect.isroutine(resolved):
        return str(resolved.__name__)
    path = reward_path(resolved)
    return path if path in REGISTRY else type(resolved).__name__


def reward_path(reward: Callable[..., Any]) -> str:
    """The name that a callable is registered under, else its `module:name`, or that of its class."""
    found = reward if inspect.isroutine(reward) or inspect.isclass(reward) else type(reward)
    path = f"{found.__module__}:{found.__qualname__}"
    return next((name for name, registered in REGISTRY.items() if registered == path), path)


def _unknown(name: str) -> str:
    known = ", ".join(sorted(REGISTRY))
    near = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "a custom reward is written `module.path:function`"
    return f"unknown reward {name!r}; known: {known}; {hint}"


def _import(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise CRDError(f"reward {path!r} is not of the form `module.path:function`; give both parts")
    # A console script does not search the working directory, where people keep their reward file.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except CRDError:
        raise
    except Exception as error:
        raise CRDError(
            f"reward {path!r}: importing {module_name!r} failed with {one_line(error)}; "
            "check the module path (it is looked up from the working directory too)"
        ) from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "check the spelling"
            raise CRDError(f"reward {path!r}: {module_name!r} has no attribute {part!r}; {hint}")
        found = getattr(found, part)
    return found
