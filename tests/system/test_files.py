"""Files are replaced atomically, and not through symbolic links."""

import os

from ddpm_jax.system.files import open_atomic


def test_a_draft_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / f".{os.getpid()}.draft").symlink_to(tmp_path / "victim")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    with open_atomic(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "a").is_symlink()
