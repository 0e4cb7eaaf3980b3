"""The target that a user gives for CPUs. Importing this imports TVM."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from tvm.target import Target, codegen

from ...errors import ConfigError
from .exported import FLAGS, processor_flags

EXAMPLE = '"llvm -mcpu=x86-64-v3" or {"kind": "llvm", "mcpu": "x86-64-v3"}'


def of_user(text: str) -> Target:
    """A target of TVM's JSON, or of a line `llvm -mcpu=NAME -mattr=+A,-B`, as TVM took it once.

    Raises:
        ConfigError: TVM does not know it, it is for no CPU, or it is for instructions that this one has not.
    """
    options = _of_json(text) if text.startswith("{") else _of_line(text)
    try:
        target = Target(options)
    except (ValueError, TypeError) as error:
        _refuse(text, str(error).splitlines()[0])
    if target.kind.name != "llvm":
        _refuse(text, f"it is for {target.kind.name}, and programs for CPUs are made by llvm")
    cpu = options.setdefault("mcpu", codegen.llvm_get_system_cpu())
    if not known(cpu):
        _refuse(text, f"LLVM knows no processor {cpu!r} here")
    target = Target(options)
    missing = sorted(FLAGS[f] for f in map(str, codegen.llvm_get_cpu_features(target)) if f in FLAGS)
    missing = [flag for flag in missing if flag not in processor_flags()]
    if missing:
        _refuse(text, f"this processor has no {', '.join(missing)}, and could not run what is made for it")
    return target


def known(cpu: str) -> bool:
    """Whether LLVM has a processor of that name."""
    return cpu in codegen.llvm_get_cpu_archlist(Target("llvm"))


def _of_json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        _refuse(text, f"it is no JSON ({error})")
    return dict(found)


def _of_line(text: str) -> dict[str, Any]:
    """`kind -option=value …`; of mattr the values are a list."""
    kind, *options = text.split()
    found: dict[str, Any] = {"kind": kind}
    for option in options:
        name, equals, value = option.lstrip("-").partition("=")
        if not option.startswith("-") or not equals:
            _refuse(text, f"{option!r} is no -option=value")
        found[name] = value.split(",") if name == "mattr" else value
    return found


def _refuse(text: str, reason: str) -> NoReturn:
    raise ConfigError(f"SSDOPS_TVM_TARGET={text} is no target for CPUs: {reason}; one is {EXAMPLE}")
