import pytest

from gradlab.checks import UsageError
from gradlab.extras import installed, require


def test_what_is_installed_is_not_complained_about():
    assert installed("vmas", "torch")
    assert not installed("vmas", "no_such_module")
    require("vmas", "vmas", "torch")


def test_missing_packages_are_named_with_the_command_that_installs_them():
    with pytest.raises(UsageError) as error:
        require("mamujoco", "torch", "no_such_module", "nor_this")
    assert str(error.value) == (
        "mamujoco environments need no_such_module and nor_this, which are not installed. "
        "Install them: pip install 'gradlab[mamujoco]'"
    )
