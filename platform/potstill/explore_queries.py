"""What a query of Aim's explorers may reach."""

from __future__ import annotations

from typing import Any


def narrow_queries() -> None:
    """Let Aim's queries in this process ask for data and for nothing else.

    They are Python in a sandbox that refuses names with an underscore; but `run.db.engine` and `run.run.repo` are at
    hand without one, and `str.format` reaches any name (CVE-2025-5321). Whoever has the token may query anyway; this is
    for the query that he was sent and pastes.
    """
    import math
    from datetime import datetime, timedelta

    from aim.sdk.query_utils import ContextView, RunView, SequenceView
    from aim.storage import query
    from aim.storage.containertreeview import ContainerTreeView
    from aim.storage.inmemorytreeview import InMemoryTreeView
    from aim.storage.proxy import AimObjectProxy
    from aim.storage.types import SafeNone

    plain = (str, bytes, bool, int, float, complex, list, tuple, dict, set, frozenset, range)
    plain += (datetime, timedelta, type(None), SafeNone, SequenceView)
    handles = {"db", "run", "structured_run_cls"}
    handles |= {"meta_run_tree", "meta_run_attrs_tree", "proxy_cache"}
    # a proxy stands for what was logged, but has the names of the view into the store, too
    views = (ContainerTreeView, InMemoryTreeView, ContextView)
    inner = {name for view in views for name in dir(view)} | {"cache"}
    inner -= {"get", "keys", "items", "values"}

    def attribute(thing: Any, name: str, default: Any = None) -> Any:
        kind = type(thing)  # isinstance would believe a proxy
        if kind is AimObjectProxy:
            if name in inner and name[0] != "_":
                return thing[name]  # such as config.cache
            allowed = True
        elif kind is RunView:
            allowed = name not in handles
        else:
            allowed = kind in plain or thing is datetime or thing is timedelta or thing is math
        if not allowed or name[0] == "_" or name in ("format", "format_map"):
            raise AttributeError(f"a query may not ask for .{name} of {kind.__name__}")
        return getattr(thing, name, default)

    def check(self: Any, **params: Any) -> Any:
        # as Aim's, with names of its own for each question: an assignment inside (:=) would stay for all others
        try:
            return eval(self._checker, {**query.restricted_globals, **params})
        except BaseException as error:
            query.logger.warning("query failed, %s", error)
            return False

    # what they let a query write to is any object that has every attribute, as a view of a run has: it could be rewritten
    given = query.restricted_globals["__builtins__"]
    kept = {name: what for name, what in given.items() if name not in ("setattr", "delattr")}
    query.restricted_globals["__builtins__"] = kept
    query.restricted_globals["_getattr_"] = attribute
    query.RestrictedPythonQuery.check = check
