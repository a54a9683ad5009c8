from __future__ import annotations

import re

import numpy as np
from reports import (
    ATTACK,
    add_corruption,
    add_linear_probe,
    add_log,
    add_ood,
    add_osr,
    assert_inert,
    make_run,
    report,
    row,
    write_rows,
)
from safetensors.numpy import save_file


def test_names_from_files_are_escaped(tmp_path):
    run = make_run(tmp_path / ATTACK.replace("/", "\u2215"), 0, extra_view=ATTACK, data={"name": ATTACK}, **{ATTACK: 1})
    other = make_run(tmp_path / "b", 1)
    names = {"dataset": ATTACK, "split": ATTACK, ATTACK: ATTACK}
    for each in (run, other):
        add_linear_probe(each, classes=(ATTACK, "cat"), **names)
        add_osr(each)
        rows = add_corruption(each, names=("fog", ATTACK), **names)
        write_rows(each / "eval" / "corruption.json", rows)
        score = row("osr", ATTACK, "auroc", 0.5, pretraining=ATTACK)
        write_rows(each / "eval" / "osr.json", [score])
        samples = {f"random:6:0/{name}": np.arange(4) % 2 for name in ("is_known", ATTACK.replace("/", "|"))}
        save_file(samples, each / "eval" / "osr_samples.safetensors")
    page, markdown = report(run, other)
    assert_inert(page)
    assert page.tables["Linear probe by class"][1][0] in (ATTACK, "cat")
    assert {line[0] for line in page.tables["Linear probe by class"][1:]} == {ATTACK, "cat"}
    assert page.tables["Results"][1][0].startswith(run.name)
    assert page.words.count("<script>alert(1)") > 10  # as text
    outside_code = re.sub(r"(`+) .*? \1(?!`)|`[^`\n]*`", "", re.sub(r"\\.", "", markdown))
    assert "<" not in outside_code
    assert "`" not in outside_code


def test_the_page_stands_alone(runs):
    for run in runs:
        add_log(run), add_linear_probe(run), add_osr(run), add_ood(run, "svhn"), add_corruption(run)
    page, _ = report(*runs)
    assert_inert(page)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    wanted = re.findall(r"url\(#([^)]*)\)", page.text)
    wanted += [a[name][1:] for _, a in page.elements for name in ("href", "xlink:href") if a.get(name, "")[:1] == "#"]
    assert len(ids) == len(set(ids))
    assert len(wanted) > 100
    assert page.text.count("<svg viewBox") > 20
    assert {*wanted} <= {*ids}
    assert len(page.text) < 2_000_000


def test_the_same_runs_give_the_same_page(runs):
    for seed, run in enumerate(runs):
        add_linear_probe(run, seed), add_osr(run, seed), add_corruption(run, seed)
    assert report(*runs)[0].text == report(*runs)[0].text
