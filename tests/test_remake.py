"""Pages of the docs whose tables are made by the commands above them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = """\
# A page

```sh remake
echo kept > file
```

```sh remake
cat file
```

<!-- printed -->
what stood here
<!-- end -->

```sh
exit 1
```
"""


def remake(folder, page, *words):
    (folder / "page.md").write_text(page)
    command = [sys.executable, str(ROOT / "benchmarks" / "remake.py"), "page.md", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done, (folder / "page.md").read_text()


def test_what_is_printed_takes_the_place_of_what_was(tmp_path):
    done, page = remake(tmp_path, PAGE)
    assert done.returncode == 0, done.stderr
    expected = PAGE.replace("\nwhat stood here\n", "\n\nkept\n\n")
    assert page == expected
    assert remake(tmp_path, page)[1] == page


def test_a_command_that_fails_leaves_the_page(tmp_path):
    page = PAGE.replace("cat file", "cat no-such-file; echo more")
    done, kept = remake(tmp_path, page)
    assert (done.returncode, kept) == (1, page)
    assert "page.md is as it was: a command ended with 1" in done.stderr
    assert "no-such-file" in done.stderr


def test_a_page_without_a_command_is_a_mistake(tmp_path):
    done, kept = remake(tmp_path, PAGE.replace("sh remake", "sh remade"))
    assert done.returncode == 2
    assert "no block that begins with ```sh remake" in done.stderr
    assert kept == PAGE.replace("sh remake", "sh remade")


def test_commands_find_this_unigrpo(tmp_path):
    _, page = remake(tmp_path, PAGE.replace("cat file", "command -v unigrpo"))
    assert f"\n{Path(sys.executable).parent / 'unigrpo'}\n" in page


def test_only_the_named_commands_are_run(tmp_path):
    (tmp_path / "file").write_text("as it was")
    done, page = remake(tmp_path, PAGE, "--only", "cat file")
    assert done.returncode == 0, done.stderr
    assert page == PAGE.replace("\nwhat stood here\n", "\n\nas it was\n\n")
    done, page = remake(tmp_path, PAGE, "--only", "cat")
    assert (done.returncode, page) == (2, PAGE)
    assert "no block of 'cat'; it has ['echo kept > file', 'cat file']" in done.stderr
