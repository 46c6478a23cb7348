"""Arrays in ``.npy`` bytes: decoded without a copy, never unpickled, looked at for NaN."""

import io
from itertools import product

import numpy as np
import pytest

from dist_decoder.data.npy import all_finite, decode_array, npy_header
from dist_decoder.errors import FormatError
from dist_decoder.token_dtypes import decode_tokens


def npy(array: np.ndarray) -> memoryview:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return memoryview(buffer.getvalue())


@pytest.mark.parametrize(
    "array",
    [
        np.arange(15, dtype=np.float16).reshape(3, 5),
        np.asfortranarray(np.arange(15, dtype=np.float32).reshape(3, 5)),
        np.arange(24, dtype=np.float64).reshape(2, 3, 4),
        np.zeros((0, 7), np.float16),
    ],
)
def test_arrays_are_decoded_without_a_copy(array: np.ndarray) -> None:
    data = npy(array)
    decoded = decode_array(data, lambda: "here")
    np.testing.assert_array_equal(decoded, array)
    assert decoded.dtype == array.dtype
    assert array.size == 0 or np.shares_memory(decoded, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (memoryview(b""), "not a .npy array"),
        (memoryview(b"\x93NUMPY\x01\x00"), "not a .npy array"),
        (memoryview(b"PK\x03\x04" + bytes(200)), "does not start like"),
        (npy(np.arange(5)), "dtype int64"),
        (npy(np.arange(5.0))[:-1], "not a .npy array"),
    ],
)
def test_bytes_that_are_no_array(data: memoryview, words: str) -> None:
    with pytest.raises(FormatError, match=f"here.*{words}"):
        decode_array(data, lambda: "here")


def test_headers_are_those_of_numpy() -> None:
    for shape, dtype in product([(3, 5), (256, 1664), (7,)], ["float16", "int8", "uint16"]):
        array = np.zeros(shape, dtype)
        assert bytes(npy(array)) == npy_header(shape, array.dtype) + array.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "uint16", "float32", "float64"])
def test_every_pattern_of_bits_is_finite_or_not(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    if dtype == "float32":
        values = (bits.astype(np.uint32) << 16).view(np.float32)
        # Those of NaN with the smallest and largest fractions.
        values = np.concatenate([values, (bits.astype(np.uint32) << 16 | 1).view(np.float32)])
    elif dtype == "float64":
        values = (bits.astype(np.uint64) << np.uint64(48)).view(np.float64)
    else:
        values = bits.view(dtype)
    wide = decode_tokens(values) if dtype == "uint16" else values
    found = [all_finite(values[n : n + 1]) for n in range(0, len(values), 7)]
    assert found == np.isfinite(wide[::7]).tolist()
    assert 0 < sum(found) < len(found)
    assert all_finite(values[np.isfinite(wide)])
    for bad in np.flatnonzero(~np.isfinite(wide))[::97]:
        assert not all_finite(np.append(values[np.isfinite(wide)][:50], values[bad]))
