"""What tests of several files are built from."""

from modeling_deit_ti.arguments import Arguments
from modeling_deit_ti.parsing import parse_arguments


def arguments(**flags) -> Arguments:
    return parse_arguments([f"--{name}={value}" for name, value in flags.items()])
