"""What the temporal benchmark says about sizes of files with a table, against counts made by hand."""

from bench.temporal.table import projected


def test_a_qwen_image_file():
    found = projected("Qwen-Image")
    # 60 blocks with two projections to 6 x 3072 values, the last norm's to 2 x 3072; 256 -> 3072 -> 3072 before them.
    values = 60 * 2 * 6 * 3072 + 2 * 3072
    assert found["temporal_parameters"] == values * (3072 + 1) + 3072 * (256 + 1) + 3072 * (3072 + 1)
    assert found["table_bytes"]["rows 1000"] == 1000 * (2 * values + 4)
    assert found["table_bytes"]["low rank 64"] == 2 * values * 64 + 4 * 1000 * (64 + 1)
    assert found["bytes_16_bit"] - found["bytes_8_bit"] == found["parameters"] - found["temporal_parameters"]
    assert 0.33 < found["temporal_bytes"] / found["bytes_16_bit"] < 0.34
