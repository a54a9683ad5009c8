"""Pages of the site by their paths in the repository, so that links work there and on the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "docs", "docs/reference", "examples", "experiments", "experiments/results")
LINKED = (".md", ".png", ".py", ".jsonl")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.*"))]
    for path in [*paths, *sorted((ROOT / "ssl_gradmix").glob("*.py"))]:
        if path.suffix in LINKED:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
