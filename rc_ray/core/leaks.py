"""What makes prepared data leak-proof, asserted over every user and case of every domain.

The checks start from the clean histories and from what is about to be written. They share nothing
with the code that splits and draws but the meaning of the fields.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rc_ray.core.cleaning import CleanDomain
from rc_ray.core.draws import COLD_USER, FEW_SHOT, HELD_OUT, UNLABELED
from rc_ray.core.held_out import HeldOut
from rc_ray.core.histories import Histories, Indices
from rc_ray.core.pairs import PairSet
from rc_ray.core.splits import PURPOSES, TEMPERATURES, CaseTable, SplitDomain
from rc_ray.data_config import DataConfig
from rc_ray.errors import UserError

Flags = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.int64]


class LeakError(UserError):
    """The prepared data would tell a model what it is tested on."""


def check_no_leak(
    domain: CleanDomain, result: SplitDomain, config: DataConfig, held_out: HeldOut | None = None
) -> None:
    """Assert that neither training nor any case's history tells a target.

    Args:
        domain: clean histories.
        result: the split.
        config: the data section.
        held_out: what the domains hold out on which the adapter of this one is mixed.

    Raises:
        LeakError: a training history holds a cold item, an item of a cold title, a click that
            another domain's training must lack, or something that its user did not do; a user held
            out of training trains, or a few-shot user trains more than allowed; a validation case
            that chooses an adapter has a user, a title or a test target that another domain holds
            out; with a split by time, something trains that happened at or after the
            first cut-off. A target stands in its user's training history or in its own history; a
            case's history holds a cold item, or what came at or after its target's period; a case
            is of another kind than its tag says.
    """
    held_out = held_out or HeldOut.nothing()
    met = _Met(domain, result.cold)
    _check_training(domain, result, config, held_out, met)
    _check_cases(domain, result, config, met)
    _check_choosing(domain, result, held_out)


def check_candidates(domain: CleanDomain, cases: CaseTable, name: str, candidates: Indices) -> None:
    """Assert that lists of candidates are sound.

    Args:
        domain: clean histories.
        cases: (B,)
        name: of the list.
        candidates: (B, C)

    Raises:
        LeakError: a list has not exactly one positive, repeats an item, or holds a negative from
            the user's full history.
    """
    user = cases.user
    is_target = candidates == cases.target[:, None]
    about = f"candidates of the list `{name}`"
    _require(
        domain, is_target.sum(axis=1) == 1, user, f"the {about} do not hold exactly one positive"
    )
    ordered = np.sort(candidates, axis=1)
    _require(
        domain, (ordered[:, 1:] != ordered[:, :-1]).all(axis=1), user, f"the {about} repeat an item"
    )
    if not len(cases):
        return
    first, last = int(user.min()), int(user.max())
    offsets = domain.offsets[first : last + 2]
    part = Histories(domain.items[offsets[0] : offsets[-1]], offsets - offsets[0])
    met = PairSet(_pairs(domain, part.owners + first, part.values))
    fine = ~met.holds(_pairs(domain, user[:, None], candidates)) | is_target
    _require(domain, fine.all(axis=1), user, f"a negative of the {about} stands in the history")


class _Met:
    """Finds the row of the clean domain where a user met an item."""

    def __init__(self, domain: CleanDomain, cold: Flags) -> None:
        self._domain = domain
        keys = _pairs(domain, domain.histories.owners, domain.items)
        self._order = np.argsort(keys)
        self._keys = keys[self._order]
        self._warm = np.flatnonzero(~cold[domain.items])
        self._warm_starts = np.searchsorted(self._warm, domain.offsets[:-1])

    def rows(
        self, user: npt.NDArray[np.integer], item: npt.NDArray[np.integer]
    ) -> tuple[npt.NDArray[np.int64], Flags]:
        """Row of each pair, and whether there is one; without one the row means nothing."""
        keys = _pairs(self._domain, user, item)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._order[place], self._keys[place] == keys

    def rows_of(
        self, histories: Histories, users: npt.NDArray[np.integer]
    ) -> tuple[npt.NDArray[np.int64], Flags]:
        """The same for every item of some users' histories.

        A sound history is the head of its user's warm rows. So the row is guessed and looked at,
        and searched for only where the item is not there.
        """
        owner = np.repeat(users.astype(np.int64), histories.lengths)
        place = np.arange(len(owner)) - np.repeat(histories.offsets[:-1], histories.lengths)
        place += self._warm_starts[owner]
        rows = self._warm[np.minimum(place, len(self._warm) - 1)]
        first, end = self._domain.offsets[owner], self._domain.offsets[owner + 1]
        known = (rows >= first) & (rows < end) & (self._domain.items[rows] == histories.values)
        rest = np.flatnonzero(~known)
        rows[rest], known[rest] = self.rows(owner[rest], histories.values[rest])
        return rows, known


def _check_training(
    domain: CleanDomain, result: SplitDomain, config: DataConfig, held_out: HeldOut, met: _Met
) -> None:
    train, draws = result.train, result.draws
    owners, items = train.owners, train.values
    _require(domain, ~result.cold[items], owners, "a cold item stands in the training history")

    cold_title = np.asarray(pc.is_in(domain.titles, value_set=domain.titles.filter(result.cold)))
    _require(
        domain, ~cold_title[items], owners, "an item of a cold title stands in the training history"
    )
    outside = np.asarray(pc.is_in(domain.titles, value_set=held_out.titles))
    _require(
        domain,
        ~outside[items],
        owners,
        "an item whose title another domain holds out stands in the training history",
    )
    lacking = _Clicks(domain, held_out.clicks)
    _require(
        domain,
        ~lacking.holds(owners, items),
        owners,
        "a click that another domain keeps from training stands in the training history",
    )
    excluded = np.asarray(pc.is_in(domain.user_ids, value_set=held_out.user_ids))
    held = excluded | (draws == COLD_USER) | (draws == HELD_OUT)
    users = np.arange(len(train))
    _require(domain, ~held | (train.lengths == 0), users, "a user who is held out trains")
    few = (draws != FEW_SHOT) | (train.lengths <= config.num_few_shot)
    _require(domain, few, users, "a few-shot user trains more than `data.num_few_shot` items")
    allowed = config.num_training_users.get(domain.name, len(users))
    within = np.cumsum(train.lengths > 0) <= allowed
    _require(domain, within, users, "more users train than `data.num_training_users` allows")

    rows, known = met.rows_of(train, users)
    _require(domain, known, owners, "the training history holds an item that the user never met")
    if result.cut_offs is not None:
        early = domain.times[rows] < result.cut_offs[0]
        _require(domain, early, owners, "an interaction at or after the first cut-off trains")


def _check_cases(domain: CleanDomain, result: SplitDomain, config: DataConfig, met: _Met) -> None:
    cases, train = result.cases, result.train
    past, user = cases.histories, cases.user
    trained = np.sort(_pairs(domain, train.owners, train.values))

    def require(holds: Flags, what: str) -> None:
        _require_case(domain, cases, holds, what)

    def require_item(holds: Flags, what: str) -> None:
        bad = np.zeros(len(cases), dtype=bool)
        bad[past.owners[~holds]] = True
        require(~bad, what)

    targets = _pairs(domain, user, cases.target)
    require(~_among(targets, trained), "target stands in the training history")
    require_item(
        past.values != np.repeat(cases.target, past.lengths), "target stands in its own history"
    )
    require_item(~result.cold[past.values], "history holds a cold item")
    is_cold = cases.split == TEMPERATURES.index("cold")
    require(result.cold[cases.target] == is_cold, "target is of the other kind")
    for tag, code in (("cold_user", COLD_USER), ("few_shot", FEW_SHOT)):
        tagged = cases.split == TEMPERATURES.index(tag)
        require(tagged == (result.draws[user] == code), f"case mixes up who is `{tag}`")
    require(result.draws[user] != HELD_OUT, "case is of a user who is held out elsewhere")
    few = cases.split == TEMPERATURES.index("few_shot")
    require(~few | (past.lengths <= config.num_few_shot), "history is longer than `num_few_shot`")

    when, known = met.rows(user, cases.target)
    require(known, "target was never met by its user")
    at, known = met.rows_of(past, user)
    require_item(known, "history holds an item that its user never met")
    if result.cut_offs is None:
        # Rows of a user are in time order, so a place tells before from after within ties too.
        require_item(at < np.repeat(when, past.lengths), "history reaches past its target")
        return
    first = np.asarray(result.cut_offs)[cases.purpose.astype(np.int64)]
    moment, moments = domain.times[when], domain.times[at]
    require(moment >= first, "target lies before its period")
    is_valid = cases.purpose == PURPOSES.index("valid")
    require(~is_valid | (moment < result.cut_offs[1]), "target lies after its period")
    require_item(moments < np.repeat(first, past.lengths), "history reaches into its period")


def _check_choosing(domain: CleanDomain, result: SplitDomain, held_out: HeldOut) -> None:
    """Validation clicks of scored users choose an adapter; those of unlabeled users do not."""
    cases = result.cases
    is_valid = cases.purpose == PURPOSES.index("valid")
    chosen = cases.take(np.flatnonzero(is_valid & (result.draws[cases.user] != UNLABELED)))
    user, past = chosen.user, chosen.histories
    owner = user[past.owners]
    users = np.asarray(pc.is_in(domain.user_ids, value_set=held_out.user_ids))
    titles = np.asarray(pc.is_in(domain.titles, value_set=held_out.titles))
    tests = _Clicks(domain, held_out.clicks.filter(held_out.clicks["is_target"]))
    what = "title that another domain holds out"
    test = "the test target of its user in another domain"
    for holds, words in (
        (~users[user], "case is of a user whom another domain holds out"),
        (~titles[chosen.target], f"target has a {what}"),
        (~tests.holds(user, chosen.target), f"target is {test}"),
    ):
        _require_case(domain, chosen, holds, words)
    for holds, words in (
        (~titles[past.values], f"history holds a {what}"),
        (~tests.holds(owner, past.values), f"history holds {test}"),
    ):
        fine = np.ones(len(chosen), dtype=bool)
        fine[past.owners[~holds]] = False
        _require_case(domain, chosen, fine, words)


class _Clicks:
    """Clicks of other domains by user id and title, looked up in this one's."""

    def __init__(self, domain: CleanDomain, clicks: pa.Table) -> None:
        titles = pc.unique(domain.titles)
        self._num_titles = len(titles)
        self._title = np.asarray(pc.index_in(domain.titles, value_set=titles), dtype=np.int64)
        found = pa.table(
            {
                "user": pc.index_in(clicks["user_id"], value_set=domain.user_ids),
                "title": pc.index_in(clicks["title"], value_set=titles),
            }
        ).drop_null()
        user, title = (np.asarray(found[name], dtype=np.int64) for name in ("user", "title"))
        self._keys = np.sort(user * self._num_titles + title)

    def holds(self, user: npt.NDArray[np.integer], item: npt.NDArray[np.integer]) -> Flags:
        keys = np.asarray(user, dtype=np.int64) * self._num_titles + self._title[item]
        return _among(keys, self._keys)


def _pairs(
    domain: CleanDomain, user: npt.NDArray[np.integer], item: npt.NDArray[np.integer]
) -> Keys:
    return np.asarray(user, dtype=np.int64) * len(domain.item_ids) + item


def _among(keys: Keys, ordered: Keys) -> Flags:
    """Whether each key stands in the sorted keys."""
    if not len(ordered):
        return np.zeros(keys.shape, dtype=bool)
    place = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return np.asarray(ordered[place] == keys)


def _require(domain: CleanDomain, holds: Flags, user: npt.NDArray[np.integer], what: str) -> None:
    if not holds.all():
        name = domain.user_ids[int(user[int(np.argmin(holds))])]
        raise LeakError(f"domain `{domain.name}`, user `{name}`: {what}")


def _require_case(domain: CleanDomain, cases: CaseTable, holds: Flags, what: str) -> None:
    if not holds.all():
        case = int(np.argmin(holds))
        name = domain.user_ids[int(cases.user[case])]
        raise LeakError(f"domain `{domain.name}`, user `{name}`: the {cases.name(case)} {what}")
