"""The table of temporal features and the module that reads it, without a host."""

import pytest
import torch
from torch import nn

from tfmq.temporal.cache import CachedLayer, FeatureTable, Group, Switch, equal_rows

CPU = torch.device("cpu")
ROW = 4 * 3  # bytes of a float32 row of three values


def table_of(slots: int) -> FeatureTable:
    table = FeatureTable(slots * ROW, ROW)
    table.groups["g"] = Group()
    return table


def put(table: FeatureTable, key: str, values: list[float], ahead: bool = False) -> bool:
    """An entry with one slot per value."""
    if not table.reserve(key, {"g": list(range(len(values)))}, CPU, ahead=ahead):
        return False
    table.write(key, "layer", torch.tensor(values)[:, None].expand(-1, 3))
    table.complete(key)
    return True


def read(table: FeatureTable, key: str) -> list[float] | None:
    if not table.select(key):
        return None
    return table.rows["layer"].index_select(0, table.groups["g"].index)[:, 0].tolist()


def test_rows_come_back():
    table = table_of(4)
    put(table, "a", [1.0, 2.0])
    put(table, "b", [3.0])
    assert read(table, "a") == [1.0, 2.0]
    assert read(table, "b") == [3.0]
    assert read(table, "c") is None


def test_the_least_recently_read_entry_goes_first():
    table = table_of(2)
    put(table, "a", [1.0])
    put(table, "b", [2.0])
    assert read(table, "a") == [1.0]
    put(table, "c", [3.0])
    assert "b" not in table
    assert (read(table, "a"), read(table, "c")) == ([1.0], [3.0])
    assert table.statistics.evicted == 1


def test_memory_stays_within_the_budget():
    table = table_of(5)
    for i in range(40):
        put(table, f"k{i}", [float(i)])
        assert table.nbytes <= 5 * ROW
        assert read(table, f"k{i}") == [float(i)]
    assert len(table) == 5


def test_one_entry_is_kept_even_if_it_is_larger_than_the_budget():
    table = table_of(1)
    assert put(table, "a", [1.0, 2.0, 3.0])
    assert read(table, "a") == [1.0, 2.0, 3.0]


def test_computing_ahead_pushes_out_only_what_has_been_read():
    table = table_of(2)
    put(table, "a", [1.0], ahead=True)
    put(table, "b", [2.0], ahead=True)
    assert not put(table, "c", [3.0], ahead=True)
    read(table, "a")
    assert put(table, "c", [3.0], ahead=True)
    assert "a" not in table and "b" in table
    table.all_read()
    assert put(table, "d", [4.0], ahead=True)


def test_an_entry_that_was_not_completed_is_not_read():
    table = table_of(2)
    table.reserve("a", {"g": [0]}, CPU)
    assert not table.select("a")
    table.drop("a")
    assert put(table, "b", [1.0, 2.0])


def test_equal_rows_share_a_slot():
    table = table_of(2)
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 2.0]])
    local = equal_rows(x)
    assert local == [0, 1, 0]
    table.reserve("a", {"g": local}, CPU)
    table.write("a", "layer", torch.tensor([[5.0] * 3, [6.0] * 3]))
    table.complete("a")
    assert read(table, "a") == [5.0, 6.0, 5.0]


def test_rows_are_equal_by_their_bits():
    assert equal_rows(torch.tensor([[0.0], [-0.0]])) == [0, 1]
    assert equal_rows(torch.tensor([[float("nan")], [float("nan")]], dtype=torch.bfloat16)) == [0, 0]


def test_the_index_is_written_in_place():
    table = table_of(2)
    put(table, "a", [1.0])
    put(table, "b", [2.0])
    table.select("a")
    address = table.groups["g"].index.data_ptr()
    table.select("b")
    assert table.groups["g"].index.data_ptr() == address


def test_rows_of_another_kind_are_refused():
    table = table_of(2)
    put(table, "a", [1.0])
    table.reserve("b", {"g": [0]}, CPU)
    with pytest.raises(ValueError, match="clear the table"):
        table.write("b", "layer", torch.zeros(1, 3, dtype=torch.float16))


def test_clear_frees_everything():
    table = table_of(2)
    put(table, "a", [1.0])
    table.select("a")
    table.clear()
    assert (table.nbytes, len(table), table.groups["g"].index) == (0, 0, None)
    assert put(table, "a", [2.0]) and read(table, "a") == [2.0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) * 2


@pytest.fixture
def cached() -> tuple[Net, CachedLayer, FeatureTable, Switch]:
    """`first` is cached, and its table holds other numbers than it would compute."""
    torch.manual_seed(0)
    net, table = Net().requires_grad_(False), table_of(4)
    real = net.first
    switch = Switch(lambda path, x: real(x))
    switch.bypass = False
    layer = CachedLayer("layer", real, "g", table.groups["g"], switch, table)
    net.first = layer
    put(table, "a", [1.0, 2.0])
    put(table, "b", [3.0, 4.0])
    table.select("a")
    layer.bind((2,))
    return net, layer, table, switch


def test_a_cached_layer_reads_its_rows(cached):
    net, _, table, _ = cached
    x = torch.zeros(2, 2)
    assert net.first(x)[:, 0].tolist() == [1.0, 2.0]
    table.select("b")
    assert net.first(x)[:, 0].tolist() == [3.0, 4.0]


def test_a_cached_layer_owns_no_parameters_but_shows_its_keys(cached):
    net, _, _, _ = cached
    assert {name for name, _ in net.named_parameters()} == {"second.weight", "second.bias"}
    assert set(net.state_dict()) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    net.first.weight = nn.Parameter(torch.ones(3, 2), requires_grad=False)
    assert net.first.real.weight.sum() == 6
    assert not list(net.first.parameters())


@pytest.mark.parametrize("case", ["bypass", "other rows", "other shape", "not trusted", "cleared", "unexpected input"])
def test_what_the_table_does_not_fit_is_computed(cached, case: str):
    net, layer, table, switch = cached
    x = torch.full((2, 2), 0.5)
    if case == "bypass":
        switch.bypass = True
    elif case == "other rows":
        x = torch.full((3, 2), 0.5)
    elif case == "other shape":
        x = torch.full((2, 1, 2), 0.5)
    elif case == "not trusted":
        layer.trusted = False
    elif case == "cleared":
        table.clear()
    else:
        switch.expected = {"g": torch.full((2, 2), 0.25)}
    assert torch.equal(net.first(x), layer.real(x))
    assert switch.wrong == ({"layer"} if case == "unexpected input" else set())


def test_the_graph_of_torch_compile_holds_no_break_and_is_not_made_again(cached):
    net, _, table, _ = cached
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=count, fullgraph=True)
    x = torch.zeros(2, 2)
    for key in ("a", "b", "a"):
        table.select(key)
        assert torch.equal(compiled(x), net(x))
    assert len(graphs) == 1
