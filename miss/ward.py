"""`miss ward`: what a person decides about a ward of the region."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from miss.configuration import State
from miss.console import err
from miss.ledgers import open_ledger, require_known_ward, require_region

app = typer.Typer(help="Wards of the region: what a person decides about one.", no_args_is_help=True)

Ward = Annotated[str, typer.Argument(metavar="WARD", help="hospital/ward", show_default=False)]


@app.command()
def settle(ward: Ward, state: State = Path(".")) -> None:
    """Settles what a ward's old disk may have lost: its node came back with a new disk, and every answer says
    that something of it may be missing until it was compared, sent again, or given up. DIR is the region's.

    \b
    Example:
      miss ward settle san-martino/radiology --state region
    """
    from federation.ward_orders import SETTLE
    from miss.orders import carry_out

    require_region(state)
    with open_ledger(state) as ledger:
        require_known_ward(ledger, ward)
    err.print(carry_out(state, SETTLE, {"ward": ward}), markup=False)
