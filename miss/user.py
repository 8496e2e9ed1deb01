"""`miss user`: the people who may sign in, in the region's ledger or in one node's. A password comes from the
terminal, from stdin or is made here; never from an argument, which others could read in the process list."""

from __future__ import annotations

import secrets
import string
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archive.errors import InvalidInput, NotFound
from federation.policy import PEOPLE, Role
from miss.configuration import State
from miss.console import err, out, table
from miss.ledgers import open_ledger, require_ward

if TYPE_CHECKING:
    from archive.ledger import Ledger, User

app = typer.Typer(help="The people who may sign in to a portal.", no_args_is_help=True)

LETTERS = "".join(set(string.ascii_letters + string.digits) - set("0O1lI"))
GENERATED_LENGTH = 16  # 93 bits: more than any guessing needs

ROLES = tuple(role.value for role in Role if role in PEOPLE)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The name that the person signs in with.",
                                     show_default=False)]
Stdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from stdin, one line.")]
Generate = Annotated[bool, typer.Option("--generate", help="Make a password and print it, once.")]


@app.command()
def add(
    name: Name,
    role: Annotated[str, typer.Option(help="What the person is: what they see.", show_default=False,
                                      metavar="|".join(ROLES))],
    ward: Annotated[str, typer.Option(help="The technician's own ward, as `miss status` writes it.",
                                      metavar="HOSPITAL/WARD")] = "",
    display_name: Annotated[str, typer.Option(help="How pages call the person.")] = "",
    password_stdin: Stdin = False,
    generate: Generate = False,
    state: State = Path("."),
) -> None:
    """Adds a person. Without an option the password is asked for, twice, and not shown.

    \b
    Examples:
      miss user add rossi --role "regional physician" --state region
      miss user add verdi --role "ward technician" --ward san-martino/radiology --generate
      pass show miss/it | miss user add it --role "regional IT" --password-stdin
    """
    from archive.ledger import User

    with open_ledger(state) as ledger:
        if role not in ROLES:
            raise InvalidInput(f"no role {role!r}; there are: {', '.join(ROLES)}")
        if role == Role.TECHNICIAN.value:
            require_ward(ledger, state, ward)
        elif ward:
            raise InvalidInput(f"a {role} has no ward of their own: leave --ward out")
        if ledger.user(name) is not None:
            raise InvalidInput(f"there is a user {name} already; see `miss user password`")
        password = _password(name, stdin=password_stdin, generate=generate)
        create(ledger, User(name, display_name or name, role, ward or None, True), password)
    err.print(f"{name} may sign in as {role}{f' of {ward}' if ward else ''}", style="green")
    if generate:
        out.print(password, markup=False)


@app.command("ls")
def ls(state: State = Path(".")) -> None:
    """Lists who may sign in.

    \b
    Example:
      miss user ls --state region
    """
    grid = table("name", "role", "ward", "called", "enabled")
    with open_ledger(state) as ledger:
        for user in ledger.users():
            grid.add_row(user.name, user.role, user.ward or "-", user.display_name,
                         "yes" if user.enabled else "no")
    out.print(grid)


@app.command()
def disable(name: Name, state: State = Path(".")) -> None:
    """Locks a person out at once: the sessions end with the next request. The name stays in the audit log.

    \b
    Example:
      miss user disable verdi --state region
    """
    with open_ledger(state) as ledger:
        require_user(ledger, name)
        ledger.disable_user(name)
    err.print(f"{name} may not sign in any more", style="green")


@app.command()
def password(name: Name, password_stdin: Stdin = False, generate: Generate = False,
             state: State = Path(".")) -> None:
    """Sets a new password; whoever is signed in with the old one is signed out.

    \b
    Examples:
      miss user password rossi --state region
      miss user password rossi --generate --state region
    """
    from federation.passwords import hash_password

    with open_ledger(state) as ledger:
        require_user(ledger, name)
        new = _password(name, stdin=password_stdin, generate=generate)
        ledger.set_password(name, hash_password(new, name))
        ledger.end_user_sessions(name)
    err.print(f"{name} has a new password", style="green")
    if generate:
        out.print(new, markup=False)


def create(ledger: Ledger, user: User, password: str) -> None:
    """Adds `user` with the hash of `password`."""
    from federation.passwords import hash_password

    ledger.add_user(user, hash_password(password, user.name))


def make_password() -> str:
    return "".join(secrets.choice(LETTERS) for _ in range(GENERATED_LENGTH))


def require_user(ledger: Ledger, name: str) -> User:
    found = ledger.user(name)
    if found is None:
        raise NotFound(f"there is no user {name}; `miss user ls` lists them")
    return found[0]


def _password(name: str, *, stdin: bool, generate: bool) -> str:
    from federation.passwords import check_rules

    if stdin and generate:
        raise InvalidInput("--password-stdin and --generate exclude each other")
    if generate:
        return make_password()
    if stdin:
        given = sys.stdin.readline().rstrip("\n")
    else:
        given = typer.prompt(f"Password of {name}", hide_input=True, confirmation_prompt=True, err=True)
    check_rules(given, name)
    return given
