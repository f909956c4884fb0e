import pytest
from image_utils import datasets_folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of data sets, an empty current folder; catalogs are put right after."""
    with datasets_folder(tmp_path, monkeypatch) as folder:
        yield folder
