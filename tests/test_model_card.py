from __future__ import annotations

import timm
from huggingface_hub import ModelCard
from support import load_script, make_run, only

from ssl_gradmix import model_card
from ssl_gradmix.evaluation import results
from ssl_gradmix.run_folder import RunFolder

linear_probe = load_script("eval/linear_probe.py").main


def test_card_of_a_training_is_read_by_the_hub(tmp_path):
    recipe = load_script("recipes/simclr_gradmix.py").main
    quick = {"training.epochs": 1, "training.batch_size": 256, "method.output_dim": 8}
    options = [part for name, value in quick.items() for part in (f"--{name}", str(value))]
    recipe(["--run", str(tmp_path / "x"), *options])
    folder = RunFolder(tmp_path / "x")
    card = ModelCard.load(folder.backbone / "README.md")
    assert card.data.to_dict()["library_name"] == "timm"
    assert {"simclr", "gradmix"} < set(card.data.tags)
    images = timm.create_model(f"local-dir:{folder.backbone}", pretrained=True).pretrained_cfg
    assert f"{images['input_size'][1]} px" in card.text
    logged = folder.read_log()[-1]["knn"]
    assert f"| in training | {logged:.3g} |" in card.text


def test_evaluation_fills_in_its_number_and_keeps_the_rest(run):
    card = run / "backbone" / "README.md"
    start, end = model_card.MARKS
    card.write_text(f"---\nlicense: mit\n---\nmine\n{start}\nold\n{end}\nmine, too\n")
    linear_probe([str(run), "--epochs", "2", "--label_fractions", "[0.5]"])
    linear_probe([str(run), "--epochs", "1", "--data.classes", "[1, 2]"])
    text = card.read_text()
    assert text.startswith(f"---\nlicense: mit\n---\nmine\n{start}\n")
    assert text.endswith(f"{end}\nmine, too\n")
    assert "old" not in text
    rows, _ = results.read(run / "eval" / "linear_probe-digits.json")
    whole = rows[results.param(rows, "label_fraction").isna()]
    probe = only(whole, "linear", "top1")
    assert text.count("| linear probe, top 1 |") == 2
    assert f"{probe['n']} of digits/test | {100 * probe['value']:.1f}% " in text


def test_card_without_marks_is_not_changed(tmp_path):
    run = make_run(tmp_path / "x")
    (run / "backbone" / "README.md").write_text("mine alone")
    linear_probe([str(run), "--epochs", "1"])
    assert (run / "backbone" / "README.md").read_text() == "mine alone"


def test_encoder_without_a_card_gets_none(run):
    linear_probe([str(run), "--epochs", "1"])
    assert not (run / "backbone" / "README.md").exists()
