"""Command-line flags from a dataclass: every field is a flag, and its range is checked once."""

import argparse
import math
from dataclasses import field, fields, replace
from typing import get_args, get_origin


def flag(default, help, choices=None, least=-math.inf, most=1e9, above=-math.inf,
         interval=False):
    """A dataclass field with its --help text and the values that it, or a list's items, may take:
    choices, or numbers from least to most and greater than `above`; interval: a list of two
    numbers, the smaller one first."""
    metadata = {"help": help, "choices": choices and tuple(choices), "least": least, "most": most,
                "above": above, "interval": interval}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(parser, config_class, arguments=None, defaults=None, skip=()):
    """Parse a command line -> (config, namespace of the parser's other arguments), or exit with 2.
    defaults: function from that namespace to the config that flags change (config_class()); skip:
    fields that are no flags here."""
    for f in (f for f in fields(config_class) if f.name not in skip):
        # A flag that is not given leaves no attribute, so that defaults stay in one place.
        options = {"help": f.metadata["help"].replace("%", "%%"), "default": argparse.SUPPRESS}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(f.type) is list:
            options |= {"type": get_args(f.type)[0], "nargs": "*", "choices": f.metadata["choices"]}
        else:
            options |= {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    parser.usage = parser.usage or "%(prog)s [--FLAG VALUE ...]"  # an error shows it, in one line
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
        name, value = "--" + f.name.replace("_", "-"), getattr(config, f.name)
        choices, least, above, most = map(f.metadata.get, ("choices", "least", "above", "most"))
        if f.metadata["interval"] and (len(value) != 2 or value[0] > value[1]):
            raise ValueError(f"{name} needs two numbers, the smaller one first, not "
                             f"{' '.join(map(str, value)) or 'none'}")
        for item in value if isinstance(value, list) else [value]:
            if choices and item not in choices:
                raise ValueError(f"{name} {item} must be one of {', '.join(map(repr, choices))}")
            if not isinstance(item, int | float):
                continue
            for wanted, met in (("a number", item == item),  # NaN is not
                                (f"at least {least:g}", item >= least),
                                (f"above {above:g}", item > above),
                                (f"at most {most:g}", item <= most)):
                if not met:
                    raise ValueError(f"{name} {item} must be {wanted}")
