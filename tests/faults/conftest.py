import pytest
from toy_runs import make_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A small finished data set; read only."""
    return make_shards(tmp_path_factory.mktemp("data"))
