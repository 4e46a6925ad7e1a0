"""A writer process, to be killed: `python -m tests.store.write_units DUMP KIND UNIT...` writes the units that are not sealed yet."""

import sys

from eagle3_offline.store.seal import sealed
from eagle3_offline.store.writer import PartExists

from .dumps import spec_of, write_unit


def main(dump: str, kind: str, *units: str) -> None:
    print("ready", flush=True)
    for unit in map(int, units):
        if not sealed(dump, unit):
            try:
                write_unit(dump, spec_of(kind), unit, threads=unit % 3)
            except PartExists:
                print("lost", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
