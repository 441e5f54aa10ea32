"""Puts the recipes, which import each other by name, and the helpers of these tests on the path."""
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / 'recipes')]

import tiny  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return tiny.write_folder(tmp_path / 'images')


@pytest.fixture
def records(tmp_path):
    return tiny.write_records(tmp_path / 'records')
