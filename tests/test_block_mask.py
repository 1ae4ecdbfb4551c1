"""Block masks: lists against the dense mask, PyTorch's lists, ready-made masks and scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import attention_masks, score_mods
from minitorch.block_mask import BlockMask, create_block_mask
from minitorch.mask_functions import and_masks, create_mask, noop_mask, or_masks

N = 96
CAP: Any = score_mods.softcap(3.0)
PARENTS = [-1, *((n - 1) // 2 for n in range(1, N))]
IDS = attention_masks.document_ids([10, 50, 36])
POSITIONS = np.arange(N)[:, None], np.arange(N)


def ancestors(n: int) -> set[int]:
    return set() if n < 0 else {n} | ancestors(PARENTS[n])


def near(q: Any, k: Any, size: int, reach: int) -> Any:
    """Whether k lies in the window of q, which an edge moves inside."""
    return abs(np.clip(q, reach, size - 1 - reach) - k) <= reach


Q, K = POSITIONS
IS_GLOBAL = np.isin(np.arange(N), [3, 50])
READY = {
    "causal": (attention_masks.causal(), Q >= K),
    "causal_offset": (attention_masks.causal(5), Q + 5 >= K),
    "sliding_window": (attention_masks.sliding_window(5, 2), (Q - K <= 5) & (K - Q <= 2)),
    "dilated_window": (
        attention_masks.dilated_window(4, 3),
        np.isin(Q - K, [0, 3, 6, 9]),
    ),
    "global_first": (attention_masks.global_tokens(3), (Q < 3) | (K < 3)),
    "global_tokens": (attention_masks.global_tokens([3, 50], N), IS_GLOBAL[Q] | IS_GLOBAL[K]),
    "longformer": (attention_masks.longformer(8, 2), (abs(Q - K) <= 4) | (Q < 2) | (K < 2)),
    "prefix_lm": (attention_masks.prefix_lm(10), (K < 10) | (Q >= K)),
    "document": (attention_masks.document(IDS), IDS[Q] == IDS[K]),
    "streaming": (
        attention_masks.streaming(9),
        (Q >= K) & ((Q - K < 9) | (K < 4)),
    ),
    "neighborhood": (
        attention_masks.neighborhood(12, 8, 3),
        near(Q % 12, K % 12, 12, 1) & near(Q // 12, K // 12, 8, 1),
    ),
    "shared_prefix": (
        attention_masks.shared_prefix(20, [30, 46]),
        (Q >= K) & ((K < 20) | ((Q < 50) == (K < 50))),
    ),
    "tree": (
        attention_masks.tree(PARENTS),
        np.array([[k in ancestors(q) for k in range(N)] for q in range(N)]),
    ),
}


def states_of(dense: Any, block: tuple[int, int]) -> Any:
    """0, 1 or 2 for each block, from the dense mask."""
    rows, columns = (-(-n // b) for n, b in zip(dense.shape, block, strict=True))
    found = np.zeros((rows, columns), np.uint8)
    for i in range(rows):
        for j in range(columns):
            part = dense[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            full = part.all() and part.shape == block
            found[i, j] = 2 if full else 1 if part.any() else 0
    return found


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("block", [(16, 16), (7, 20)])
def test_ready_made_masks_and_their_blocks(name: str, block: tuple[int, int]) -> None:
    function, dense = READY[name]
    mask = create_block_mask(function, None, None, N, N, block)
    np.testing.assert_array_equal(create_mask(function, None, None, N, N)[0, 0], dense)
    np.testing.assert_array_equal(mask.to_mask()[0, 0], dense)
    np.testing.assert_array_equal(mask.lists.states()[0], states_of(dense, block))
    np.testing.assert_array_equal(
        mask.lists.transposed().states()[0], states_of(dense.T, block[::-1])
    )


def test_block_diffusion_by_its_three_parts() -> None:
    dense = create_mask(attention_masks.block_diffusion(48, 8), None, None, N, N)[0, 0]
    same, before = Q[:48] // 8 == K[:48] // 8, Q[:48] // 8 > K[:48] // 8
    np.testing.assert_array_equal(dense[:48, :48], same)
    np.testing.assert_array_equal(dense[:48, 48:], before)
    np.testing.assert_array_equal(dense[48:, :48], np.zeros((48, 48), bool))
    np.testing.assert_array_equal(dense[48:, 48:], same | before)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(READY)), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40),
    st.integers(1, 40),
)  # fmt: skip
def test_retiled_lists_are_safe(name: str, m: int, n: int, tile_m: int, tile_n: int) -> None:
    """A tile that is empty or full is so in the dense mask; what divides is exact."""
    function, dense = READY[name]
    lists = create_block_mask(function, None, None, N, N, (m, n)).lists
    found = lists.retiled((m, n), (tile_m, tile_n), (N, N)).states()[0]
    exact = states_of(dense, (tile_m, tile_n))
    assert np.all(found[exact > 0] > 0)
    assert np.all(exact[found == 2] == 2)
    if tile_m % m == 0 and tile_n % n == 0:
        np.testing.assert_array_equal(found > 0, exact > 0)
        np.testing.assert_array_equal(found == 2, exact == 2)


def test_masks_per_batch_and_head() -> None:
    lengths, slopes = np.array([5, 60]), np.array([1, 2, 3])

    def function(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx < lengths[b]) & ((q_idx + kv_idx) % slopes[h] == 0)

    mask = create_block_mask(function, 2, 3, N, N, 16)
    assert mask.shape == (2, 3, N, N)
    for b in range(2):
        for h in range(3):
            dense = (lengths[b] > K) & ((Q + K) % slopes[h] == 0)
            np.testing.assert_array_equal(mask.to_mask()[b, h], dense)
            np.testing.assert_array_equal(mask[b, h].to_mask()[0, 0], dense)
            np.testing.assert_array_equal(mask.to_dense()[b, h] > 0, states_of(dense, (16, 16)) > 0)
    assert mask[1].shape == (1, 3, N, N)
    assert mask[:, 1:].shape == (2, 2, N, N)
    with pytest.raises(ValueError, match=r"B is None, and mask_mod .* depends on b: give B"):
        create_block_mask(function, None, 3, N, N)
    with pytest.raises(IndexError, match="size 2"):
        mask[2]


def test_one_mask_for_all_batches_and_heads() -> None:
    mask = attention_masks.longformer(9, [0, 50], N)
    one = create_block_mask(mask, None, None, N, N - 3, 8)
    many = create_block_mask(mask, 2, 3, N, N - 3, 8)
    assert many.shape == (2, 3, N, N - 3)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_indices", "q_indices"):
        found, wanted = getattr(many, name), getattr(one, name)
        np.testing.assert_array_equal(found, np.broadcast_to(wanted, found.shape))
    assert str(many).splitlines()[1:3] == ["[0, 0] of 6:", str(one).splitlines()[1]]


def test_what_is_captured_is_copied() -> None:
    ids = IDS.copy()
    mask = create_block_mask(attention_masks.document(ids), None, None, N, N, 16)
    ids[:] = 0
    np.testing.assert_array_equal(mask.to_mask()[0, 0], READY["document"][1])


def test_combined_masks() -> None:
    causal, window = attention_masks.causal(), attention_masks.sliding_window(9, 9)
    both = create_mask(and_masks(causal, window), None, None, N, N)[0, 0]
    either = create_mask(or_masks(causal, window), None, None, N, N)[0, 0]
    np.testing.assert_array_equal(both, (Q >= K) & (abs(Q - K) <= 9))
    np.testing.assert_array_equal(either, (Q >= K) | (abs(Q - K) <= 9))
    assert create_mask(and_masks(), None, None, 3, 3).all()
    assert not create_mask(or_masks(), None, None, 3, 3).any()
    assert create_block_mask(noop_mask, None, None, 300, 200).sparsity() == 0
    with pytest.raises(TypeError, match="mask_mods must be functions"):
        and_masks(causal, 3)  # type: ignore[arg-type]


def test_a_mask_that_nothing_decides_but_looking() -> None:
    def scattered(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx * 31 + kv_idx * 17) % 97 == 5

    dense = (Q * 31 + K * 17) % 97 == 5
    lists = create_block_mask(scattered, None, None, N, N, 8).lists
    np.testing.assert_array_equal(lists.states()[0], states_of(dense, (8, 8)))


def test_ranges_that_are_too_many_stay_partial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitorch.kernels.flash_attention.block_lists.MOST_RANGES", 3)
    mask = create_block_mask(attention_masks.causal(), None, None, N, N, 16)
    assert set(np.diagonal(mask.lists.states()[0])) == {1}
    np.testing.assert_array_equal(mask.to_mask()[0, 0], READY["causal"][1])


def test_from_kv_blocks_and_back() -> None:
    mask = create_block_mask(attention_masks.prefix_lm(30), None, None, N, N - 3, 16)
    again = BlockMask.from_kv_blocks(
        mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices,
        16, mask.mask_mod, mask.seq_lengths,
    )  # fmt: skip
    np.testing.assert_array_equal(again.to_mask(), mask.to_mask())
    np.testing.assert_array_equal(again.q_indices, mask.q_indices)
    blocks = BlockMask.from_kv_blocks(
        np.array([[[1, 2]]]), np.array([[[[1, 0], [0, 1]]]]), BLOCK_SIZE=4
    )
    assert blocks.shape == (1, 1, 8, 8)
    assert blocks.to_mask()[0, 0].sum() == 3 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_indices": np.zeros((1, 2, 2), int)}, "wanted .B, H, rows, columns."),
        ({"kv_num_blocks": np.array([[[1]]])}, "kv_num_blocks has shape"),
        ({"kv_num_blocks": np.array([[[1, 3]]])}, "must be 0 to 2"),
        ({"kv_indices": np.array([[[[1, 0], [0, 2]]]])}, "must be 0 to 1"),
        ({"kv_indices": np.array([[[[1, 0], [1, 1]]]])}, "a block twice"),
        ({"full_kv_num_blocks": np.array([[[1, 1]]])}, "give both, or none"),
        ({"BLOCK_SIZE": 0}, "BLOCK_SIZE"),
        ({"BLOCK_SIZE": (1, 2, 3)}, "wanted a number, or"),
        ({"seq_lengths": (99, 8)}, "are not the 2 x 2 blocks"),
        ({"seq_lengths": 8}, "seq_lengths is 8; wanted .Q_LEN, KV_LEN."),
        ({"seq_lengths": (8, 8, 8)}, "seq_lengths is .8, 8, 8.; wanted"),
    ],
)
def test_blocks_that_are_none(change: dict[str, Any], message: str) -> None:
    good = {
        "kv_num_blocks": np.array([[[1, 2]]]), "kv_indices": np.array([[[[1, 0], [0, 1]]]]),
        "BLOCK_SIZE": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        BlockMask.from_kv_blocks(**{**good, **change})


def test_bigbird() -> None:
    mask = attention_masks.bigbird(2048, 64, window=3, global_blocks=2, random_blocks=3, seed=1)
    states = mask.to_dense()[0, 0]
    assert states[[0, -1]].all()
    assert states[:, [0, -1]].all()
    assert all(states[n, n - 1 : n + 2].all() for n in range(1, 31))
    assert set(states[2:-2].sum(1)) == {8}
    assert mask.sparsity() == pytest.approx(100 - 100 * states.mean())
    again = attention_masks.bigbird(2048, 64, window=3, global_blocks=2, random_blocks=3, seed=1)
    np.testing.assert_array_equal(again.to_dense(), mask.to_dense())
    per_head = attention_masks.bigbird(1000, 64, seed=1, heads=4)
    assert per_head.shape == (1, 4, 1000, 1000)
    assert (per_head.to_dense()[0, 0] != per_head.to_dense()[0, 1]).any()
    scattered = attention_masks.random_blocks(1000, 50, 4).to_dense()[0, 0]
    assert set(scattered.sum(1)) == {4}
    assert attention_masks.bigbird(64, 64).to_mask().all()
    with pytest.raises(ValueError, match="window must be odd"):
        attention_masks.bigbird(640, 64, window=2)


def test_text_and_picture() -> None:
    mask = create_block_mask(attention_masks.causal(), None, None, 64, 64, 16)
    assert str(mask).splitlines() == [
        "BlockMask(shape=(1, 1, 64, 64), sparsity=37.50%)", "▒", "█▒", "██▒", "███▒",
    ]  # fmt: skip
    pytest.importorskip("matplotlib")
    figure = mask.picture()
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), mask.lists.states()[0])
    with pytest.raises(IndexError, match="index 1 of a BlockMask is outside of its size 1"):
        mask.picture(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: create_block_mask(CAP, None, None, 9, 9),
            "one like this is a score_mod",
        ),
        (lambda: create_block_mask(noop_mask, None, None, 0, 9), "Q_LEN"),
        (lambda: create_block_mask(noop_mask, 0, None, 9, 9), "B"),
        (
            lambda: create_block_mask(attention_masks.document(IDS), None, None, N + 1, N),
            "size is 96",
        ),
        (lambda: attention_masks.global_tokens([3, N], N), "tokens"),
        (lambda: attention_masks.neighborhood(4, 4, 2), "size must be odd"),
        (lambda: attention_masks.tree([-1, 1]), "earlier token"),
        (lambda: attention_masks.prefix_lm(-3), "prefix must be lengths"),
        (lambda: attention_masks.bigbird(64, 16, seed=-1), "seed must be at least 0"),
        (lambda: attention_masks.bigbird(64, 16)["x"], "index must be a whole number"),
        (lambda: attention_masks.bigbird(64, 16)[0:0], "leaves no batch"),
        (lambda: attention_masks.bigbird(64, 16)[0, 3:], "or no head"),
        (lambda: score_mods.softcap(0.0), "above 0"),
        (lambda: score_mods.softcap(math.nan), "above 0"),
        (lambda: score_mods.relative_bias(np.zeros((2, 4))), "2 n . 1"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        call()


# ----- scores -----


def score_of(function: Any, heads: int = 4, length: int = 20) -> Any:
    return create_mask(function, None, heads, length, length)[0]


def test_ready_made_scores() -> None:
    q, k = np.arange(20)[:, None], np.arange(20)
    slopes = 2.0 ** -np.arange(2, 10, 2)
    np.testing.assert_allclose(score_mods.alibi_slopes(4), slopes)
    np.testing.assert_allclose(
        score_of(score_mods.alibi(4)), -slopes[:, None, None] * abs(q - k), rtol=1e-6
    )
    table = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    np.testing.assert_array_equal(
        score_of(score_mods.relative_bias(table)), table[:, np.clip(q - k, -3, 3) + 3]
    )
    assert (score_of(score_mods.softcap(5.0)) == 0).all()
    # The slopes of 6 heads are those that ALiBi's authors print for it.
    np.testing.assert_allclose(
        score_mods.alibi_slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_by_the_papers_code(bidirectional: bool) -> None:
    """Mesh TensorFlow's loop, with its float32 logarithm."""
    found = score_mods.t5_buckets(32, 128, bidirectional)
    for n, relative in enumerate(range(-128, 129)):
        bucket, buckets, distance = 0, 32, -relative
        if bidirectional:
            buckets //= 2
            bucket += (distance < 0) * buckets
            distance = abs(distance)
        else:
            distance = max(distance, 0)
        exact = buckets // 2
        if distance < exact:
            bucket += distance
        else:
            ratio = math.log(distance / exact) / math.log(128 / exact)
            bucket += min(exact + int(np.float32(ratio) * (buckets - exact)), buckets - 1)
        assert found[n] == bucket


def test_attention_sinks_are_a_key_more() -> None:
    rng = np.random.default_rng(2)
    scores, value = rng.normal(size=(2, 3, 5, 7)), rng.normal(size=(2, 3, 7, 4))
    sink = rng.normal(size=3)
    weights = np.exp(scores)
    total = weights.sum(-1, keepdims=True)
    wanted = weights @ value / (total + np.exp(sink)[:, None, None])
    found = score_mods.attention_sinks(
        minitorch.tensor(weights / total @ value), minitorch.tensor(np.log(total)[..., 0]),
        minitorch.tensor(sink),
    )  # fmt: skip
    np.testing.assert_allclose(found.to_numpy(), wanted, rtol=1e-10)
    with pytest.raises(ValueError, match="wanted"):
        score_mods.attention_sinks(found, found, minitorch.tensor(sink))


# ----- PyTorch's -----


@pytest.mark.parametrize("block", [128, (64, 128)])
def test_the_same_lists_as_pytorch(block: Any) -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    window = 200

    def function(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < window + h * 100)

    ours = create_block_mask(function, 1, 2, 700, 900, block)
    theirs = flex.create_block_mask(function, 1, 2, 700, 900, device="cpu", BLOCK_SIZE=block)
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours.to_dense(), theirs.to_dense().numpy())
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(theirs, f"{name}_num_blocks").numpy()
        np.testing.assert_array_equal(getattr(ours, f"{name}_num_blocks"), counts)
        mine, other = getattr(ours, f"{name}_indices"), getattr(theirs, f"{name}_indices").numpy()
        for place in np.ndindex(counts.shape):
            np.testing.assert_array_equal(
                mine[place][: counts[place]], other[place][: counts[place]]
            )


def test_lists_are_made_without_a_matrix() -> None:
    """131072 tokens: 17 billion scores, of which each list holds its blocks alone."""
    function = attention_masks.sliding_window(1000)
    lists = create_block_mask(function, None, None, 131072, 131072).lists
    assert len(lists.entries) < 10 * 1024


ROWS_OF: dict[str, Any] = {
    "causal": attention_masks.causal(),
    "documents": attention_masks.document(IDS),
    "by head": lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (kv_idx % (h + 2) == 0),
}


@pytest.mark.parametrize("name", [*ROWS_OF, "bigbird"])
def test_rows_are_those_of_the_whole_mask(name: str) -> None:
    mask = attention_masks.bigbird(N, 8, random_blocks=1)
    if name in ROWS_OF:
        mask = create_block_mask(ROWS_OF[name], None, 2, N, N, 16)
    whole = mask.to_mask()
    for start, count, keys in ((0, N, N), (5, 1, 6), (37, 20, N), (90, 6, 96), (0, 7, 7)):
        rows = mask.rows(start, count, keys)
        np.testing.assert_array_equal(
            rows.to_mask(), whole[:, :, start : start + count, :keys], str((start, count, keys))
        )
        for h, allowed in enumerate(rows.to_mask()[0]):
            np.testing.assert_array_equal(
                rows.to_dense()[0, h], states_of(allowed, rows.BLOCK_SIZE) > 0
            )
        assert mask.rows(start, count, keys) is rows
    assert mask.rows(0, N) is mask
    with pytest.raises(ValueError, match="queries 90 to 99 and 96 keys are not within"):
        mask.rows(90, 10)


def test_rows_have_one_graph_wherever_they_begin() -> None:
    mask = create_block_mask(ROWS_OF["documents"], None, None, N, N, 16)
    assert mask.rows(3, 2).function.graph == mask.rows(50, 7, 60).function.graph
