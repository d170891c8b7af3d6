"""MFCC and each of its parts against stored torchaudio results."""

import math

import pytest
import torch
from golden_files import golden
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from smpconv_zoo.data.mfcc import dct_matrix, mel_filterbank, mfcc


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(golden("mfcc.safetensors"))


def test_mel_filterbank(stored: dict[str, Tensor]) -> None:
    # Heights of at most 1; the same float32 operations, up to the order a machine does them in.
    torch.testing.assert_close(mel_filterbank(), stored["mel_filterbank"], rtol=0, atol=1e-6)


def test_bands_0_and_3_are_empty() -> None:
    assert (mel_filterbank().sum(0) == 0).nonzero().flatten().tolist() == [0, 3]


def test_dct_matrix(stored: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dct_matrix(), stored["dct_matrix"], rtol=0, atol=1e-6)  # entries of at most 0.18


@given(st.integers(1, 40), st.data())
def test_dct_columns_are_orthonormal(n_mels: int, data: st.DataObject) -> None:
    n_mfcc = data.draw(st.integers(1, n_mels))
    dct = dct_matrix(n_mfcc, n_mels, torch.float64)
    torch.testing.assert_close(dct.T @ dct, torch.eye(n_mfcc, dtype=torch.float64), rtol=0, atol=1e-12)


def test_window_is_the_periodic_hann_window(stored: dict[str, Tensor]) -> None:
    torch.testing.assert_close(torch.hann_window(200), stored["window"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mfcc(stored: dict[str, Tensor], dtype: torch.dtype) -> None:
    waveform = stored["waveform_int16"].to(dtype) / 32768
    coefficients = mfcc(waveform)
    assert coefficients.shape == (2, 20, 161) and coefficients.dtype == dtype
    # Values of up to 110, the log of nearly empty bands included; float32 against float64 differ by 8e-5.
    torch.testing.assert_close(coefficients.float(), stored["mfcc"], rtol=0, atol=2e-4)


def test_silence_has_only_the_first_coefficient() -> None:
    coefficients = mfcc(torch.zeros(1, 16000, dtype=torch.float64))
    expected = torch.zeros_like(coefficients)
    expected[:, 0] = math.log(1e-6) * math.sqrt(64)
    torch.testing.assert_close(coefficients, expected, rtol=0, atol=1e-9)


def test_a_frame_is_centred_on_its_sample() -> None:
    waveform = torch.zeros(1, 16000)
    waveform[0, 8000] = 1
    loudness = mfcc(waveform)[0, 0]
    assert loudness.argmax() == 80


@pytest.mark.parametrize(("samples", "frames"), [(101, 2), (199, 2), (16001, 161), (16099, 161), (16100, 162)])
def test_any_length_that_can_be_reflected(samples: int, frames: int) -> None:
    assert mfcc(torch.randn(1, samples)).shape == (1, 20, frames)


def test_a_batch_is_its_waveforms() -> None:
    waveform = torch.randn(3, 1000, dtype=torch.float64)
    one_by_one = torch.cat([mfcc(one[None]) for one in waveform])
    torch.testing.assert_close(mfcc(waveform), one_by_one, rtol=0, atol=1e-9)
    assert mfcc(waveform[:0]).shape == (0, 20, 11)


@pytest.mark.parametrize(
    ("waveform", "reason"),
    [
        (torch.zeros(16000), r"shape \(N, samples\)"),
        (torch.zeros(1, 1, 16000), r"shape \(N, samples\)"),
        (torch.zeros(1, 16000, dtype=torch.int16), r"torch\.int16"),
        (torch.zeros(1, 100), "too short"),
        (torch.zeros(1, 0), "too short"),
    ],
)
def test_bad_waveforms(waveform: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        mfcc(waveform)


def test_bad_sizes() -> None:
    waveform = torch.zeros(1, 1000)
    with pytest.raises(ValueError, match=r"n_mfcc must lie in 1 \.\.\. n_mels"):
        mfcc(waveform, n_mfcc=65)
    with pytest.raises(ValueError, match="hop_length must be positive"):
        mfcc(waveform, hop_length=0)
    with pytest.raises(ValueError, match="sizes must be positive"):
        mfcc(waveform, sample_rate=0)
