"""Owns Verification (PS3.4 Annex A): a C-ECHO is answered. It never does more."""

from __future__ import annotations

from node.dimse.association import Context
from node.dimse.exchange import Caller, Exchange
from node.dimse.messages import Command
from node.dimse.status import SUCCESS


class Echo:
    """C-ECHO SCP. A data set, which PS3.7 9.3.5 does not foresee, is passed over."""

    def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
        exchange.association.drain(context)
        exchange.answer(context, command, SUCCESS)

    def is_prompt(self, caller: Caller, command: Command) -> bool:
        return True
