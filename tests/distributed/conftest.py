import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool():
    """Four processes."""
    pool = Pool(4)
    yield pool
    pool.close()
