"""One warm sandbox at the strongest level for the tests that only need programs to run."""

import pytest

from megatron_sod.errors import SandboxError
from megatron_sod.sandbox import open_sandbox


@pytest.fixture(scope="session")
def sandbox():
    try:
        opened = open_sandbox(timeout_s=20)
    except SandboxError as error:
        pytest.skip(str(error))
    with opened:
        yield opened
