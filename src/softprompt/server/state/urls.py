"""Which database a URL means."""

from __future__ import annotations

import importlib.util

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from softprompt.errors import ConfigError, MissingDependencyError

_POSTGRESQL = "postgresql+psycopg"
_DRIVERS = {
    "sqlite": "sqlite",
    "postgres": _POSTGRESQL,
    "postgresql": _POSTGRESQL,
    _POSTGRESQL: _POSTGRESQL,
}


def database_url(text: str) -> URL:
    """The URL with the driver that we use. Raises ConfigError for one that is not SQLite's or PostgreSQL's."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:  # not shown: there may be a password in it
        raise ConfigError(f"the database's URL cannot be read; {_EXAMPLES}") from error
    if url.drivername not in _DRIVERS:
        raise ConfigError(f"the database's URL begins with {url.drivername}://, which is not served; {_EXAMPLES}")
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigError("sqlite:// without a file keeps nothing; give sqlite:///FILE, four slashes for /FILE")
    if url.drivername != "sqlite" and importlib.util.find_spec("psycopg") is None:
        raise MissingDependencyError("PostgreSQL needs psycopg; pip install 'softprompt[postgresql]'")
    return url.set(drivername=_DRIVERS[url.drivername])


_EXAMPLES = "give sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
