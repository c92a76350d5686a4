import pytest

from moejax import ledger, machine
from moejax.errors import InputError
from moejax.ledger import Ledger, ledger_of


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is taken to hold 400 MB."""
    monkeypatch.setattr(ledger, "resident_memory", lambda: 400_000_000)


def test_what_is_held_counts() -> None:
    own = Ledger(1_000_000_000)
    assert own.left == 600_000_000
    assert own.fits(600_000_000) and not own.fits(600_000_001)
    assert Ledger(100).left == 0 and not Ledger(100).fits(1)


def test_a_refusal_asks_for_what_is_enough() -> None:
    with pytest.raises(InputError, match=r"^it cannot be done in 450.00 MB; 0.55GB would do$"):
        Ledger(450_000_000).refuse("it cannot be done", 130_000_000)
    assert Ledger(550_000_000).fits(130_000_000)
    assert Ledger(450_000_000).sentence_of(130_000_000) == "530.00 MB for everything does not fit 450.00 MB"


def test_a_users_size_or_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ledger_of("1.5GB") == Ledger(1_500_000_000)
    monkeypatch.setattr(ledger, "available_memory", lambda: 123)
    assert ledger_of(None) == Ledger(123)
    with pytest.raises(InputError, match="much"):
        ledger_of("much")
    assert machine.available_memory() > 1_000_000
