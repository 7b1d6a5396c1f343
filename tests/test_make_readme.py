"""The generated sections of the README and of docs/."""

import shutil
from pathlib import Path

import make_readme
import pytest
import readme_common


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file or directory: '"), ('{"threads": 1, "mod\n', "line 1 is no JSON (")]
)
def test_a_missing_or_damaged_record_is_named_in_a_sentence(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(make_readme.__file__).parent.parent
    (tmp_path / "tools").mkdir()
    if content is not None:
        (tmp_path / "tools" / "faults.jsonl").write_text(content)
    shutil.copytree(root / "docs", tmp_path / "docs")
    before = (tmp_path / "docs" / "reliability.md").read_text()
    for module in (make_readme, readme_common):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(make_readme, "SECTIONS", {"docs/reliability.md": make_readme.SECTIONS["docs/reliability.md"]})
    assert make_readme.main([]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("docs/reliability.md cannot be written: ")
    assert said in err
    assert "faults.jsonl" in err
    assert err.count("\n") == 1
    assert (tmp_path / "docs" / "reliability.md").read_text() == before
