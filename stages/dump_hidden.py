"""`eagle3-offline dump-hidden`: the target's hidden states, into the store."""

from __future__ import annotations

import click

from .common import parse_units, run_stage, sections, with_recipe, with_units


@click.command("dump-hidden", **sections("target", "dump"))
@with_recipe
@with_units
@click.option("--layers", metavar="LIST", help="Short for --set target.layers=[...]: boundaries such as 2,16,29, or auto.")
@click.option("--fit-basis", is_flag=True, help="Only fit the basis of a compact dump: once, before its units are dumped.")
def command(recipe, overrides, run_folder, units, as_json, layers, fit_basis):
    """Run the target once over the final token ids and write its hidden states, one sealed part per unit.

    Sealed parts are skipped. With dump.mode=compact, run it once with --fit-basis before the units.
    When all units are dumped, `eagle3-offline store seal` makes them one dump.
    """
    if layers:
        overrides = (*overrides, f"target.layers=[{'' if layers == 'auto' else layers}]")

    def work(r, run, stop):
        from eagle3_offline import pipeline

        if fit_basis:
            return pipeline.fit_basis(run, r, stop)
        return pipeline.dump_units(run, r, parse_units(units), stop)

    run_stage("dump-hidden", recipe, overrides, run_folder, as_json, work)
