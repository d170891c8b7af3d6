"""Mel-frequency cepstral coefficients of the Speech Commands task, in plain torch.

    waveform -> power spectrogram -> mel bands -> log(. + 1e-6) -> DCT-II

The defaults are those of the authors' code (sangnekim/SMPConv, commit de4e59a), which calls torchaudio: 16 kHz,
n_fft = window = 200 (12.5 ms), hop 100, 64 mel bands on the HTK scale, 20 coefficients. The mathematics is the
standard one (Davis & Mermelstein, IEEE Trans. ASSP 28, 1980); the tests compare with stored torchaudio results.
"""

import math

import torch
from torch import Tensor

__all__ = ["dct_matrix", "mel_filterbank", "mfcc"]


def mel_filterbank(
    n_freqs: int = 101, n_mels: int = 64, sample_rate: int = 16000, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Triangular filters, equally wide and half overlapping on the HTK mel scale, mel = 2595 log10(1 + hertz / 700).

    The triangles span 0 Hz to `sample_rate` / 2 and have height 1 (no area normalization). With the default 64 bands on
    101 frequencies the bands 0 and 3 fall between two frequencies and are all zero: the reference trains with them so.

    Args:
        n_freqs: frequencies of the spectrum, n_fft // 2 + 1, from 0 Hz to `sample_rate` / 2.
        n_mels: number of bands.
        sample_rate: in Hz.
        dtype: of the result.

    Returns:
        (n_freqs, n_mels), in [0, 1].

    Raises:
        ValueError: a size or the sample rate is not positive.
    """
    if min(n_freqs, n_mels, sample_rate) < 1:
        raise ValueError(f"sizes must be positive, got n_freqs {n_freqs}, n_mels {n_mels}, sample_rate {sample_rate}.")
    highest_mel = 2595.0 * math.log10(1.0 + sample_rate / 2 / 700.0)
    corners = 700.0 * (10.0 ** (torch.linspace(0, highest_mel, n_mels + 2, dtype=dtype) / 2595.0) - 1.0)
    hertz = torch.linspace(0, sample_rate / 2, n_freqs, dtype=dtype)[:, None]
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (hertz - left) / (centre - left)
    falling = (right - hertz) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0)


def dct_matrix(n_mfcc: int = 20, n_mels: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first `n_mfcc` columns of the orthonormal DCT-II, to be multiplied from the right.

    Args:
        n_mfcc: number of coefficients, at most `n_mels`.
        n_mels: length of the vectors to be transformed.
        dtype: of the result.

    Returns:
        (n_mels, n_mfcc), orthonormal columns.

    Raises:
        ValueError: not 1 <= n_mfcc <= n_mels.
    """
    if not 1 <= n_mfcc <= n_mels:
        raise ValueError(f"n_mfcc must lie in 1 ... n_mels, got n_mfcc {n_mfcc} and n_mels {n_mels}.")
    band = torch.arange(n_mels, dtype=dtype)[:, None]
    coefficient = torch.arange(n_mfcc, dtype=dtype)
    scale = torch.full((n_mfcc,), math.sqrt(2 / n_mels), dtype=dtype)
    scale[0] = math.sqrt(1 / n_mels)
    return scale * torch.cos(math.pi / n_mels * (band + 0.5) * coefficient)


def mfcc(
    waveform: Tensor,
    sample_rate: int = 16000,
    n_mfcc: int = 20,
    n_fft: int = 200,
    hop_length: int = 100,
    n_mels: int = 64,
) -> Tensor:
    """MFCC of mono waveforms; frame t is centred on sample t * hop_length, the ends are continued by reflection.

    Args:
        waveform: (N, samples) float32 or float64 in [-1, 1] (16-bit samples divided by 32768), samples > n_fft // 2.
        sample_rate: in Hz.
        n_mfcc: number of coefficients, at most `n_mels`.
        n_fft: length of the Fourier transform and of the Hann window, in samples.
        hop_length: between frames, in samples.
        n_mels: number of mel bands.

    Returns:
        (N, n_mfcc, 1 + samples // hop_length) of the waveform's type; (N, 20, 161) for one second at 16 kHz.

    Raises:
        ValueError: wrong rank or type, a waveform too short to reflect, or a size that is not positive.
    """
    if waveform.ndim != 2 or waveform.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"waveform must be float32 or float64 of shape (N, samples), "
            f"got {waveform.dtype} of shape {tuple(waveform.shape)}."
        )
    if n_fft < 1 or hop_length < 1:
        raise ValueError(f"n_fft and hop_length must be positive, got {n_fft} and {hop_length}.")
    n, samples = waveform.shape
    if samples <= n_fft // 2:
        raise ValueError(f"a waveform of {samples} samples is too short: n_fft {n_fft} needs more than {n_fft // 2}.")
    dtype, device = waveform.dtype, waveform.device
    filterbank = mel_filterbank(n_fft // 2 + 1, n_mels, sample_rate, dtype).to(device)
    dct = dct_matrix(n_mfcc, n_mels, dtype).to(device)
    if n == 0:  # torch.stft refuses an empty batch
        return waveform.new_empty(0, n_mfcc, 1 + samples // hop_length)
    window = torch.hann_window(n_fft, dtype=dtype, device=device)
    spectrum = torch.stft(waveform, n_fft, hop_length, window=window, pad_mode="reflect", return_complex=True)
    power = spectrum.abs().square().transpose(1, 2)
    return (torch.log(power @ filterbank + 1e-6) @ dct).transpose(1, 2)
