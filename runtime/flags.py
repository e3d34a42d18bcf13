"""Command-line flags from a dataclass: every field is a flag, and its range is checked once."""

import argparse
import math
from dataclasses import field, fields, replace
from typing import get_args, get_origin


def flag(default, help, choices=None, least=-math.inf, most=math.inf, above=-math.inf):
    """A dataclass field with its --help text and the values that it, or a list's items, may take.

    choices: the allowed values; least and most: an inclusive range; above: an exclusive lower
    bound. Numbers must be finite in any case.
    """
    metadata = {"help": help, "choices": choices and tuple(choices), "least": least, "most": most,
                "above": above}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def flag_name(name):
    """The flag of a field: embed_dim -> --embed-dim."""
    return "--" + name.replace("_", "-")


def parse(parser, config_class, arguments=None, defaults=None):
    """Parse a command line -> (config, namespace of the parser's other arguments).

    parser: argparse's, which gets a flag for every field; defaults: function from that namespace
    to the config that flags change, if not config_class(). Exits with code 2 and one line if a flag
    is unknown or out of its range.
    """
    for f in fields(config_class):
        # A flag that is not given leaves no attribute, so that defaults stay in one place.
        options = {"help": f.metadata["help"].replace("%", "%%"), "default": argparse.SUPPRESS}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(f.type) is list:
            options |= {"type": get_args(f.type)[0], "nargs": "*", "choices": f.metadata["choices"]}
        else:
            options |= {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument(flag_name(f.name), **options)
    given = parser.parse_args(arguments)
    names = {f.name for f in fields(config_class)}
    flags = {name: value for name, value in vars(given).items() if name in names}
    config = replace(defaults(given) if defaults else config_class(), **flags)
    try:
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config, given


def check(config):
    """Raise ValueError, in one line, if a field of a dataclass is out of its range."""
    for f in fields(config):
        value, limits = getattr(config, f.name), f.metadata
        for item in value if isinstance(value, list) else [value]:
            rules = {}
            if limits["choices"]:
                rules[f"one of {', '.join(map(repr, limits['choices']))}"] = (
                    item in limits["choices"])
            if isinstance(item, int | float):
                rules |= {"a finite number": math.isfinite(item),
                          f"at least {limits['least']:g}": item >= limits["least"],
                          f"above {limits['above']:g}": item > limits["above"],
                          f"at most {limits['most']:g}": item <= limits["most"]}
            for wanted, met in rules.items():
                if not met:
                    raise ValueError(f"{flag_name(f.name)} {item} must be {wanted}")
