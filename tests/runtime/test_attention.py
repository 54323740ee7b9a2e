"""CachedAttention and QKNormCachedAttention: native kernels on every instruction set and ONNX Runtime's own operators
(the functions) against numpy."""

import numpy as np
import onnxruntime
import pytest
from attention_samples import CASES, OUTPUTS, AttentionCase
from hypothesis import given, settings
from hypothesis import strategies as st
from isa import available_isas
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from op_samples import session_options

import fips_ort

TOLERANCE = 3e-6
"""Of the largest expected value."""


def native_session(case: AttentionCase, threads: int = 2) -> onnxruntime.InferenceSession:
    options = session_options()
    options.intra_op_num_threads = threads
    fips_ort.register(options)
    return onnxruntime.InferenceSession(case.model().SerializeToString(), options)


def assert_close(actual: list[np.ndarray], expected: tuple[np.ndarray, ...]) -> None:
    for name, found, wanted in zip(OUTPUTS, actual, expected, strict=True):
        assert found.shape == wanted.shape, name
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max(), err_msg=name)


def known_to_onnxruntime() -> list[str]:
    """Cases that the functions compute in this version: GroupQueryAttention of float32 on CPUs is there from 1.18 on,
    and counts a token itself in its window from 1.24 on."""
    version = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
    return [
        name for name, case in CASES.items()
        if case.is_known_to_onnxruntime and version >= ((1, 18) if case.window == -1 else (1, 24))
    ]


@pytest.mark.parametrize("name", known_to_onnxruntime())
def test_functions_agree_with_the_reference(name: str) -> None:
    case = CASES[name]
    feeds = case.feeds()
    session = onnxruntime.InferenceSession(case.model().SerializeToString(), session_options())
    y, *caches = session.run(None, feeds)
    expected = case.expected(feeds)
    # Behind a text's last token ONNX Runtime leaves what was there.
    lengths = feeds["seqlens_k"] + 1
    for found, wanted in zip(caches, expected[1:], strict=True):
        for text, length in enumerate(lengths):
            found[text, :, length:] = wanted[text, :, length:]
    assert_close([y, *caches], expected)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_reference(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIPS_ORT_ISA", isa)
    case = CASES[name]
    feeds = case.feeds()
    results = [native_session(case, threads).run(None, feeds) for threads in (1, 2)]
    assert_close(results[0], case.expected(feeds))
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


@settings(max_examples=150, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3), (10, 2)]), size=st.sampled_from([16, 32, 48, 64, 80, 96]),
    tokens=st.integers(1, 80), pasts=st.lists(st.integers(0, 90), min_size=1, max_size=3), spare=st.integers(0, 40),
    window=st.sampled_from([-1, 1, 2, 7, 32, 33, 64, 1000]), norms=st.booleans(), seed=st.integers(0, 1000),
)
def test_any_sizes(
    heads: tuple[int, int], size: int, tokens: int, pasts: list[int], spare: int, window: int, norms: bool, seed: int
) -> None:
    case = AttentionCase(*heads, size, tokens, tuple(pasts), spare, window, norms, 0.2, seed)
    feeds = case.feeds()
    assert_close(native_session(case).run(None, feeds), case.expected(feeds))


@pytest.mark.parametrize("isa", available_isas())
def test_a_cache_is_written_in_place(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime-genai runs it: past and present are the same memory."""
    monkeypatch.setenv("FIPS_ORT_ISA", isa)
    case = AttentionCase(tokens=2, pasts=(17,), spare=30)
    feeds = case.feeds()
    expected = case.expected(feeds)
    session = native_session(case)
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    behind = {name: feeds[name.replace("present", "past")][:, :, 19:].copy() for name in OUTPUTS[1:]}
    for name in OUTPUTS[1:]:
        cache = feeds[name.replace("present", "past")]
        binding.bind_output(name, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
    binding.bind_output("Y")
    session.run_with_iobinding(binding)
    (y,) = (value.numpy() for value in binding.get_outputs() if value.shape() == list(expected[0].shape))
    np.testing.assert_allclose(y, expected[0], atol=1e-5)
    for name, wanted in zip(OUTPUTS[1:], expected[1:], strict=True):
        cache = feeds[name.replace("present", "past")]
        np.testing.assert_allclose(cache[:, :, :19], wanted[:, :, :19], atol=1e-5)
        np.testing.assert_array_equal(cache[:, :, 19:], behind[name])


@pytest.mark.parametrize("isa", available_isas())
def test_scores_of_any_size(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maxima are subtracted before exp: large scores overflow nothing, and small ones are lost to none."""
    monkeypatch.setenv("FIPS_ORT_ISA", isa)
    for scale in (1e-6, 3.0, 1e4):
        case = AttentionCase(tokens=3, pasts=(100,), scale=scale)
        feeds = case.feeds()
        found, expected = native_session(case).run(None, feeds)[0], case.expected(feeds)[0]
        # Scores have the rounding of float32, which a large scale makes errors of their exponentials.
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, scale), rtol=0)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize(("name", "value"), [("qkv", np.nan), ("past_key", np.nan), ("past_key", np.inf)])
def test_what_is_not_finite_reaches_those_that_see_it(
    isa: str, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIPS_ORT_ISA", isa)
    case = AttentionCase(tokens=4, pasts=(40, 3), window=8)
    feeds = case.feeds()
    sound = native_session(case).run(None, feeds)[0]
    place: tuple[int, ...] = (0, 2, 0) if name == "qkv" else (0, 0, 35, 0)
    feeds[name][place] = value
    found = native_session(case).run(None, feeds)[0]
    infinite = np.zeros((2, 4, case.heads), bool)
    infinite[0, :3] = np.isinf(value)
    shape = (2, 4, case.heads, case.head_size)
    bad = ~np.isfinite(found.reshape(shape)).all(axis=-1)
    expected = np.zeros_like(bad)
    if name == "qkv":  # one head of its own token
        expected[0, 2, 0] = True
    else:  # all tokens that see it: those up to token 42. What infinity times a query is says its sign.
        expected[0, :3] = True
        expected &= np.isnan(value) | bad
        assert expected.any()
    np.testing.assert_array_equal(bad, expected)
    np.testing.assert_array_equal(found.reshape(shape)[~bad & ~infinite], sound.reshape(shape)[~bad & ~infinite])


@pytest.mark.parametrize("isa", available_isas())
def test_keys_that_nothing_attends_to(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of -infinity are weights of 0, wherever they are, as long as there are others."""
    monkeypatch.setenv("FIPS_ORT_ISA", isa)
    case = AttentionCase(tokens=1, pasts=(200,), norms=False)
    feeds = case.feeds()
    feeds["qkv"][..., 0] = feeds["qkv"][..., case.head_size // 2] = 1.0
    feeds["cos_cache"][...], feeds["sin_cache"][...] = 1.0, 0.0
    feeds["qkv"][..., : 4 * case.head_size] = np.abs(feeds["qkv"][..., : 4 * case.head_size])
    feeds["past_key"][0, 0, 3:100] = -np.inf  # more than a block and a part
    with np.errstate(invalid="ignore"):
        expected = case.expected(feeds)[0]
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(native_session(case).run(None, feeds)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seqlens_k": [1]}, "seqlens_k has 1: with 3 new tokens that is no text for a past of 5 and a cache of 8"),
        ({"seqlens_k": [8]}, "seqlens_k has 8"),
        ({"total_sequence_length": 7}, "seqlens_k has 7: with 3 new tokens that is no text for a past of 5 and a"),
        ({"total_sequence_length": 9}, "total_sequence_length is 9, more than a past of 5 and 3 new tokens"),
        ({"total_sequence_length": -1}, "seqlens_k has 7"),
        ({"seqlens_k": [-1]}, "seqlens_k has -1"),
        ({"seqlens_k": [2**31 - 1]}, "seqlens_k has 2147483647"),
        ({"seqlens_k": [7, 7]}, "seqlens_k has shape [2], expected [1]"),
        ({"position_ids": [[0, 1, 11]]}, "position_ids has 11, which is not one of the 11 rows of cos_cache"),
        ({"position_ids": [[0, -1, 1]]}, "position_ids has -1"),
        ({"position_ids": [[0, 1]]}, "position_ids has shape [1, 2], expected [1, 3]"),
        ({"qkv": np.zeros((1, 3, 380))}, "qkv has shape [1, 3, 380], expected [batch, tokens, 6 * a multiple of 16]"),
        ({"past_key": np.zeros((1, 1, 5, 32))}, "past_key has shape [1, 1, 5, 32], expected [1, 1, 5, 64]"),
        ({"past_value": np.zeros((1, 1, 4, 64))}, "past_value has shape [1, 1, 4, 64], expected [1, 1, 5, 64]"),
        ({"sin_cache": np.zeros((10, 32))}, "sin_cache has shape [10, 32], expected [11, 32]"),
        ({"k_norm": np.zeros(63)}, "k_norm has shape [63], expected [64]"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    case = AttentionCase()
    feeds = case.feeds()
    feeds |= {name: np.array(value, feeds[name].dtype) for name, value in changed.items()}
    with pytest.raises((Fail, InvalidArgument)) as error:
        native_session(case).run(None, feeds)
    assert "ai.fips.QKNormCachedAttention: " + message in str(error.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (AttentionCase(heads=4, kv_heads=3), "num_heads must be a multiple of kv_num_heads, got 4 and 3"),
        (AttentionCase(window=0), "local_window_size must be positive, got 0"),
        (AttentionCase(window=-2), "local_window_size must be positive, got -2"),
    ],
)
def test_attributes_are_checked_when_the_session_is_made(case: AttentionCase, message: str) -> None:
    with pytest.raises((Fail, InvalidArgument, RuntimeException)) as error:
        native_session(case)
    assert message in str(error.value)


@pytest.mark.parametrize("tokens", [0, 2])
def test_no_texts_and_no_tokens(tokens: int) -> None:
    case = AttentionCase(tokens=tokens, pasts=(4,))
    feeds = case.feeds()
    if tokens:
        feeds = {name: value[:0] if name in ("qkv", "past_key", "past_value", "seqlens_k", "position_ids") else value
                 for name, value in feeds.items()}
    y, *caches = native_session(case).run(None, feeds)
    assert y.size == 0
    if not tokens:
        np.testing.assert_array_equal(caches[0], feeds["past_key"])
