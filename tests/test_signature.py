"""Whose a bank is: signatures by openssl's own keys, checked by openssl too."""

import shutil
import subprocess

import pytest
from test_bank import contents, flip, make

import steerlib as sl
from steerlib import errors
from steerlib.bank.hub import SIGNATURE


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A private and a public key, and the public key of somebody else."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("maker", "other"):
        openssl("genpkey", "-algorithm", "ed25519", "-out", folder / f"{name}.pem")
        openssl("pkey", "-in", folder / f"{name}.pem", "-pubout", "-out", folder / f"{name}.pub")
    return folder / "maker.pem", folder / "maker.pub", folder / "other.pub"


@pytest.fixture
def signed(keys, tmp_path):
    return make().save_pretrained(tmp_path / "bank", key=keys[0])


def test_a_signed_bank_verifies_with_the_key_of_its_maker_and_no_other(signed, keys):
    bank = sl.ConceptBank.from_pretrained(signed)
    bank.verify(key=keys[1])
    bank.verify()
    with pytest.raises(errors.WrongSignature, match="not signed with this key"):
        bank.verify(key=keys[2])
    openssl(
        "pkeyutl", "-verify", "-pubin", "-inkey", keys[1], "-rawin", "-in", signed / "bank.json", "-sigfile", signed / SIGNATURE
    )


@pytest.mark.parametrize("name", ["bank.json", SIGNATURE])
def test_a_signature_does_not_outlive_a_change_of_a_byte(signed, keys, name):
    if name == "bank.json":
        text = (signed / name).read_text()
        (signed / name).write_text(text.replace('"license": "apache-2.0"', '"license": "apache-1.0"'))
    else:
        flip(signed / name, 5)
    bank = sl.ConceptBank.from_pretrained(signed)
    bank.verify()  # as a file each is a bank still: only the key tells
    with pytest.raises(errors.WrongSignature):
        bank.verify(key=keys[1])


def test_a_change_of_any_other_file_is_found_by_its_hash(signed, keys):
    flip(signed / "README.md", 0)
    with pytest.raises(errors.CorruptBank, match="README.md is not the file"):
        sl.ConceptBank.from_pretrained(signed).verify(key=keys[1])


def test_what_is_not_signed_or_no_key_says_so(keys, tmp_path):
    plain = make().save_pretrained(tmp_path / "plain")
    with pytest.raises(errors.WrongSignature, match="is not signed"):
        sl.ConceptBank.from_pretrained(plain).verify(key=keys[1])
    with pytest.raises(errors.BadBank, match="save it with key="):
        make().verify(key=keys[1])
    for wrong in (plain / "bank.json", keys[0], tmp_path / "none.pem"):
        with pytest.raises(errors.BadBank, match="expected an Ed25519 public key"):
            sl.ConceptBank.from_pretrained(plain).verify(key=wrong)
    with pytest.raises(errors.BadBank, match="expected an Ed25519 private key"):
        make().save_pretrained(tmp_path / "new", key=keys[1])
    assert not (tmp_path / "new").exists()


def test_a_signature_is_published_and_downloaded_with_its_bank(keys, monkeypatch, hub):
    make().push_to_hub("org/made", token="secret", key=keys[0])
    sl.ConceptBank.from_pretrained("org/made").verify(key=keys[1])
    make(2).push_to_hub("org/made", token="secret")
    with pytest.raises(errors.WrongSignature, match="is not signed"):
        sl.ConceptBank.from_pretrained("org/made").verify(key=keys[1])


def test_signing_changes_nothing_else(signed, tmp_path):
    without = contents(make().save_pretrained(tmp_path / "plain"))
    assert {name: data for name, data in contents(signed).items() if name != SIGNATURE} == without
