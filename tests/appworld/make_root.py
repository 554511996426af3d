"""A tiny AppWorld data root, made from the package's own models. Run by the Python that has appworld:

    python make_root.py DIR

Two scenarios of two tasks each, all about the notes of one person: `aaaaaa1_N` asks how many notes carry a tag,
`bbbbbb1_N` wants one note written. `train` has all four, `dev` the first of each.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from appworld import update_root
from appworld.api_docs import prepare_api_docs
from appworld.apps import get_all_apps
from appworld.apps.model_lib import CachedDBHandler
from appworld.collections.models import ModelCollection
from appworld.common.constants import CANARY_STRING, DB_VERSION

PERSON = {
    "first_name": "Ada",
    "last_name": "Byron",
    "email": "ada.byron@example.com",
    "phone_number": "5551234567",
}
REST = {"birthday": "1990-12-10", "sex": "female"}
PASSWORD = "n0t-a-secret"
NOTES = [("Bread", "food"), ("Soup", "food"), ("Gym", "sport"), ("Tax", "money"), ("Rent", "money"), ("Pay", "money")]
COUNTS = {"aaaaaa1_1": ("food", 2), "aaaaaa1_2": ("money", 3)}
TITLES = {"bbbbbb1_1": "Plan for Monday", "bbbbbb1_2": "Plan for Friday"}
COUNT_TEST = """
import json


def evaluate(test, public_data, private_data, main_user, models, ground_truth_answer):
    with test("the answer is right"):
        test.answer(json.loads(models.end.supervisor.Task.all()[0].answer), ground_truth_answer)
    with test("nothing changed"):
        test.case(models.changed_model_names(ignore=["simple_note.User"]), "==", set())
"""
WRITE_TEST = """
def evaluate(test, public_data, private_data, main_user, models, ground_truth_answer):
    with test("only notes changed"):
        test.case(models.changed_model_names(ignore=["simple_note.User"]), "==", {"simple_note.Note"})
    added, updated, removed = models.changed_records("simple_note.Note")
    with test("the note was added"):
        test.case([note.content for note in added], "==", [private_data.content])
    with test("no other note was touched"):
        test.case([*updated, *removed], "==", [])
"""


def main(root: Path) -> None:
    update_root(str(root))
    data = root / "data"
    api_docs(data / "api_docs" / "standard")
    base(data / "base_dbs")
    for name, (tag, number) in COUNTS.items():
        instruction = f"How many of my notes carry the tag {tag}?"
        task(data, name, instruction, COUNT_TEST, {"tag_of_interest": tag}, number)
    for name, title in TITLES.items():
        content = f"{title.split()[-1]}: tidy the desk"
        instruction = f'Write a note titled "{title}" that says "{content}".'
        task(data, name, instruction, WRITE_TEST, {"content": content, "note_key": f"hidden-{name}"}, None)
    names = [*COUNTS, *TITLES]
    write(data / "datasets" / "train.txt", "\n".join(names) + "\n")
    write(data / "datasets" / "dev.txt", "\n".join(n for n in names if n.endswith("_1")) + "\n")


def api_docs(folder: Path) -> None:
    for app in get_all_apps(skip_admin=True):
        docs = prepare_api_docs(app, include_private_apis=False)
        write(folder / f"{app}.json", {doc["api_name"]: {**doc, "canary_string": CANARY_STRING} for doc in docs})


def base(folder: Path) -> None:
    folder.mkdir(parents=True)
    models = ModelCollection.load(to_db_home_path=str(folder), load_apps=get_all_apps(), create_db=True)
    models.admin.MainUser.create(**PERSON, **REST).save()
    who = {k: v for k, v in PERSON.items() if k != "phone_number"}
    user = models.simple_note.User.create(**who, password=PASSWORD, verified=True)
    user.save()
    for title, tag in NOTES:
        models.simple_note.Note.create(user_id=user.id, title=title, content=f"About {title}", tags=[tag]).save()
    models.close()
    CachedDBHandler.reset()


def task(data: Path, name: str, instruction: str, test: str, private: dict[str, Any], answer: Any) -> None:
    folder = data / "tasks" / name
    models = ModelCollection.load(
        to_db_home_path=f":memory:task_input-{name}",
        from_db_home_path=str(data / "base_dbs"),
        load_apps=get_all_apps(),
    )
    supervisor = models.supervisor.Supervisor.create(**PERSON, **REST)
    supervisor.save()
    models.supervisor.AccountPassword.create(
        supervisor_id=supervisor.id, account_name="simple_note", password=PASSWORD
    ).save()
    models.supervisor.Task.create(supervisor_id=supervisor.id, instruction=instruction).save()
    models.save(str(folder / "dbs"), format="changes", save_model_hashes=True)
    models.close()
    CachedDBHandler.reset()
    specs = {"instruction": instruction, "supervisor": PERSON, "datetime": "2023-05-18T12:00:00"}
    write(folder / "specs.json", {**specs, "db_version": DB_VERSION, "canary_string": CANARY_STRING})
    truth = folder / "ground_truth"
    requirements = [line.split('"')[1] for line in test.splitlines() if "with test(" in line]
    write(truth / "evaluation.py", test)
    write(truth / "answer.json", answer)
    write(truth / "private_data.json", private)
    write(truth / "public_data.json", {})
    write(truth / "test_data.json", [{"requirement": r, "label": "no_op_fail"} for r in requirements])
    counts = dict.fromkeys(["difficulty", "num_apps", "num_apis", "num_api_calls", "num_solution_code_lines"], 1)
    write(truth / "metadata.json", {"mode": "minimal", **counts})


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) and path.suffix != ".json" else json.dumps(content))


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    main(Path(sys.argv[1]))
