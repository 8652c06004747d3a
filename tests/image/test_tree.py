"""Who stands on what in a folder (`image/tree.py`), and `fvdfs snapshots`, which shows it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fvdfs.format.creation import CreateOptions
from fvdfs.image import chain, tree
from fvdfs.image.policy import Policy
from fvdfs.image.tree import Node, Tree
from support.builder import KIB, create
from support.mounts import fvdfs, mounted, must

SIZE = 256 * KIB


def image(path: Path, base: str = "", base_format: str = "", data_file: str = "") -> None:
    options = CreateOptions(base_img=base, base_img_fmt=base_format, data_file=data_file)
    create(path, SIZE, options, base_length=SIZE if base else None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """template.raw under a.fvd under b.fvd and c.fvd; other/x.fvd on c.fvd; alone.fvd, and what is no image."""
    images, other = tmp_path / "images", tmp_path / "other"
    images.mkdir()
    other.mkdir()
    (images / "template.raw").write_bytes(bytes(SIZE))
    image(images / "a.fvd", "template.raw", base_format="raw")
    image(images / "b.fvd", "./a.fvd")  # as the original does: its format is not stated
    image(images / "c.fvd", str(images / "a.fvd"), base_format="fvd")
    image(images / "alone.fvd", data_file="alone.data")
    image(other / "x.fvd", "../images/c.fvd", base_format="fvd")
    (images / "broken.fvd").write_bytes((images / "a.fvd").read_bytes()[:100])
    (images / "text.fvd").write_text("no image")
    return images


def names(nodes: list[Node]) -> list[str]:
    return [os.path.basename(node.path) for node in nodes]


def test_children_are_found_whatever_the_base_is_called(folder: Path) -> None:
    tree = Tree(str(folder))
    assert names(tree.children(str(folder / "a.fvd"))) == ["b.fvd", "c.fvd"]
    assert names(tree.children(str(folder / "template.raw"))) == ["a.fvd"]
    assert tree.children(str(folder / "b.fvd")) == []
    assert tree.children(str(folder / "missing.fvd")) == []


def test_a_chain_goes_down_to_the_last_image(folder: Path) -> None:
    tree = Tree(str(folder))
    assert names(tree.chain(str(folder / "b.fvd"))) == ["b.fvd", "a.fvd"]
    assert names(tree.chain(str(folder / "alone.fvd"))) == ["alone.fvd"]
    assert tree.chain(str(folder / "text.fvd")) == []


def test_a_chain_leads_to_other_folders(folder: Path) -> None:
    tree = Tree(str(folder.parent / "other"))
    assert names(tree.chain(str(folder.parent / "other/x.fvd"))) == ["x.fvd", "c.fvd", "a.fvd"]


def test_a_loop_ends(folder: Path) -> None:
    image(folder / "p.fvd", "q.fvd")
    image(folder / "q.fvd", "p.fvd")
    assert names(Tree(str(folder)).chain(str(folder / "p.fvd"))) == ["p.fvd", "q.fvd"]
    must("snapshots", folder)


def test_an_image_that_has_let_go_stands_on_nothing(folder: Path) -> None:
    create(folder / "b.fvd", SIZE, CreateOptions(base_img="a.fvd"), base_length=SIZE, all_local=True)
    tree = Tree(str(folder))
    assert names(tree.chain(str(folder / "b.fvd"))) == ["b.fvd"]
    assert names(tree.children(str(folder / "a.fvd"))) == ["c.fvd"]


def test_what_cannot_be_read_is_named(folder: Path) -> None:
    tree = Tree(str(folder))
    assert list(tree.unreadable) == [str(folder / "broken.fvd")]


def test_two_names_of_one_file_are_one_image(folder: Path) -> None:
    os.link(folder / "b.fvd", folder / "b@1.fvd")
    tree = Tree(str(folder))
    assert names(tree.children(str(folder / "a.fvd"))) == ["b.fvd", "b@1.fvd", "c.fvd"]
    node = tree.at(str(folder / "b@1.fvd"))
    assert node is not None
    assert tree.names(node.identity) == [str(folder / "b.fvd"), str(folder / "b@1.fvd")]
    assert "the same file as b@1.fvd" in must("snapshots", folder)


def test_users_of_a_data_file(folder: Path) -> None:
    tree = Tree(str(folder))
    node = tree.nodes[str(folder / "alone.fvd")]
    assert node.data_identity is not None
    assert [(user.path, part) for user, part in tree.users(node.data_identity)] == [(node.path, "data file")]


def test_snapshots_shows_a_folder(folder: Path) -> None:
    shown = must("snapshots", folder)
    for line in (f"{folder / 'template.raw'}\n", "└─ a.fvd ", "   ├─ b.fvd ", "   └─ c.fvd ", "alone.fvd "):
        assert f"\n{line}" in shown
    assert f"{folder / 'broken.fvd'}: the file ends inside the header" in shown
    assert "text.fvd" not in shown


def test_snapshots_of_a_disk_leaves_out_what_is_beside_it(folder: Path) -> None:
    image(folder / "d.fvd", "b.fvd")
    found = json.loads(must("snapshots", folder / "b.fvd", "--json"))
    assert [os.path.basename(entry["image"]) for entry in found] == ["a.fvd", "b.fvd", "d.fvd"]
    assert found[1]["stood_on_by"] == [str(folder / "d.fvd")]
    assert found[0]["base"] == str(folder / "template.raw")
    assert found[2]["virtual_size"] == SIZE


def test_snapshots_of_a_disk_in_another_folder(folder: Path) -> None:
    shown = must("snapshots", folder.parent / "other/x.fvd")
    assert "      └─ x.fvd" in shown
    assert "b.fvd" not in shown


def test_snapshots_tells_of_a_missing_base(folder: Path) -> None:
    (folder / "template.raw").unlink()
    assert "is missing" in must("snapshots", folder / "b.fvd")


def test_snapshots_through_a_mount(folder: Path) -> None:
    with mounted(folder) as mount:
        assert must("snapshots", mount.raw("c")) == must("snapshots", folder / "c.fvd")


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [("nix.fvd", 2, "there is no such file"), ("text.fvd", 2, "is no FVD image"), ("broken.fvd", 1, "ends")],
)
def test_snapshots_of_what_is_no_image(folder: Path, name: str, code: int, text: str) -> None:
    done = fvdfs("snapshots", folder / name)
    assert (done.code, done.out) == (code, "")
    assert text in done.err


def test_a_tree_reads_again_what_has_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def top_layer(path: str, policy: Policy) -> chain.Layer:
        read.append(os.path.basename(path))
        return chain.top_layer(path, policy)

    monkeypatch.setattr(tree, "top_layer", top_layer)
    Tree(str(folder), Tree(str(folder)))
    assert read.count("a.fvd") == 2  # too new: a second change may get the same time
    monkeypatch.setattr(tree, "_SETTLED", 0)
    before = Tree(str(folder))
    read.clear()
    (folder / "c.fvd").unlink()
    image(folder / "c.fvd", "alone.fvd", base_format="fvd")
    now = Tree(str(folder), before)
    assert [name for name in read if name in names(list(now.nodes.values()))] == ["c.fvd"]
    assert names(now.children(str(folder / "alone.fvd"))) == ["c.fvd"]
    assert names(now.children(str(folder / "a.fvd"))) == ["b.fvd"]
    (folder / "alone.fvd").rename(folder / "new.fvd")  # what the name of a base leads to is looked at each time
    assert names(Tree(str(folder), now).children(str(folder / "new.fvd"))) == []
