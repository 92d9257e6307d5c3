"""From a rank that was asked for, a number, a fraction or a mapping of patterns, to an entry for each site."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from hf_reparam.compress.units import Parameters
from hf_reparam.config import LowRankConfig, check_used, first_match
from hf_reparam.errors import RankError, TargetError
from hf_reparam.model.sites import Found
from hf_reparam.plan import Entry
from hf_reparam.report import SkippedReport
from hf_reparam.structures.structure import Site


def given_ranks(found: Sequence[Found], config: LowRankConfig) -> tuple[dict[str, Entry], list[SkippedReport]]:
    """One entry for each site, or the reason why it stays as it is.

    Args:
        found: the sites.
        config: with a rank. In a mapping the first pattern that matches a layer decides; layers that none matches stay.

    Raises:
        RankError: the rank is above min(in, out) of a layer that a pattern names, or of every layer; or above the rank
            that a low-rank layer already has.
        TargetError: a pattern of the mapping matches nothing, or no layer at all would become smaller.
    """
    rules = config.rank if isinstance(config.rank, Mapping) else {"*": config.rank}
    if isinstance(config.rank, Mapping):
        check_used(rules, [name for item in found for name in (*item.site.names, *item.site.aliases)], "rank")
    entries: dict[str, Entry] = {}
    skipped = []
    for item in found:
        site = item.site
        pattern = first_match(rules, (*site.names, *site.aliases))
        if pattern is None:
            skipped.append(_skip(site, "no pattern of `rank` matches"))
            continue
        value = rules[pattern]
        rank = max(1, round(value * site.full_rank)) if isinstance(value, float) else int(value or 0)
        if site.entry is not None and site.entry.rank < rank <= site.full_rank:
            raise RankError(
                f"{site.name}: it already has rank {site.entry.rank}, and rank {rank} cannot be won back from its "
                "factors; ask for a lower rank, exclude the layer, or convert the original dense model"
            )
        entry = item.structure.entry(rank, config.stored_form)
        reason = _useless(item, entry, allow_larger=config.allow_larger)
        if reason is None:
            entries[item.name] = entry
        elif isinstance(config.rank, Mapping) and site.name == pattern and rank > site.full_rank:
            raise RankError(f"{site.name}: {reason} ({_shape(site)})")
        else:
            skipped.append(_skip(site, reason))
    if not entries:
        raise _nothing(found, skipped, config)
    return entries, skipped


def _useless(item: Found, entry: Entry, *, allow_larger: bool) -> str | None:
    site = item.site
    if site.entry == entry:
        return f"already has rank {entry.rank}"
    try:
        cost = item.structure.cost(site, entry)
    except RankError as error:
        return str(error)
    if not allow_larger and cost >= item.structure.cost(site, site.entry):
        pays = f"{_shape(site)} pays below {_highest(item, entry.form) + 1}"
        form = "pair" if entry.form == "pair" else f"{entry.form} form"
        return f"a {form} of rank {entry.rank} would not be smaller: {pays}"
    return None


def _highest(item: Found, form: str) -> int:
    """The highest rank at which a site in this form holds fewer numbers than the dense weight."""
    unit = Parameters(form, least_saving=0.0)
    ranks = range(1, item.site.full_rank + 1)
    return bisect_left(ranks, float(item.site.weights), key=lambda rank: unit.cost(item, Entry(rank, form)))


def _skip(site: Site, reason: str) -> SkippedReport:
    return SkippedReport(site.name, site.kind, site.weights + site.others, reason)


def _shape(site: Site) -> str:
    return f"{site.in_features} x {site.out_features}"


def _nothing(
    found: Sequence[Found], skipped: Sequence[SkippedReport], config: LowRankConfig
) -> TargetError | RankError:
    largest = max(item.site.full_rank for item in found)
    if isinstance(config.rank, int) and config.rank > largest:
        return RankError(f"rank {config.rank} is above min(in, out) of every layer; the largest of them is {largest}")
    useful = max(_highest(item, item.structure.entry(1, config.stored_form).form) for item in found)
    return TargetError(
        f"no layer would change: {skipped[0].name}: {skipped[0].reason} (and {len(skipped) - 1} more). The highest "
        f"rank that makes any layer smaller is {useful}; allow_larger=True converts all the same"
    )
