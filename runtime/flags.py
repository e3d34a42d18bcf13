"""Command-line flags from a dataclass: every field is a flag, and its range is checked once."""

import argparse
import math
from dataclasses import field, fields, replace
from typing import get_args, get_origin


def flag(default, help, choices=None, least=None, most=None, above=None):
    """A dataclass field with its --help text and the values that it may take.

    choices: the allowed values; least and most: an inclusive range; above: an exclusive lower
    bound. Of a list, every element is checked. Numbers must be finite in any case.
    """
    metadata = {"help": help, "choices": choices and tuple(choices), "least": least, "most": most,
                "above": above}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag_name(name):
    """The flag of a field: embed_dim -> --embed-dim."""
    return "--" + name.replace("_", "-")


def add_flags(parser, config_class):
    """Add a flag to an argparse parser for every field of a dataclass made of `flag` fields."""
    for f in fields(config_class):
        # A flag that is not given leaves no attribute, so that defaults stay in one place.
        options = {"help": f.metadata["help"].replace("%", "%%"), "default": argparse.SUPPRESS}
        if f.type is bool:
            parser.add_argument(flag_name(f.name), action=argparse.BooleanOptionalAction, **options)
            continue
        many = get_origin(f.type) is list
        parser.add_argument(flag_name(f.name), choices=f.metadata["choices"],
                            type=get_args(f.type)[0] if many else f.type,
                            nargs="*" if many else None, **options)


def parse(parser, config_class, arguments=None, defaults=None):
    """Parse a command line -> (config, namespace of the parser's other arguments).

    defaults: function from that namespace to the config that flags change, if not config_class().
    Exits with code 2 and one line if a flag is unknown or out of its range.
    """
    add_flags(parser, config_class)
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
            if item is None or isinstance(item, bool):
                continue
            if limits["choices"] and item not in limits["choices"]:
                wanted = f"one of {', '.join(map(repr, limits['choices']))}"
            elif not isinstance(item, int | float):
                continue
            elif not math.isfinite(item):
                wanted = "a finite number"
            elif limits["least"] is not None and item < limits["least"]:
                wanted = f"at least {limits['least']:g}"
            elif limits["above"] is not None and item <= limits["above"]:
                wanted = f"above {limits['above']:g}"
            elif limits["most"] is not None and item > limits["most"]:
                wanted = f"at most {limits['most']:g}"
            else:
                continue
            raise ValueError(f"{flag_name(f.name)} {item} must be {wanted}")
