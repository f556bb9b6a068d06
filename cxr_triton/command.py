"""`cxr-triton profiles` and `tasks`: the models that are known, and what each can be asked."""

from __future__ import annotations

import click

from cxr_triton.cli import PROFILES, json_option, printable, write_json
from cxr_triton.profile import ModelProfile, load_profile, profile_names


@click.command()
@json_option
def profiles(json_path: str | None):
    """List the model profiles that come with cxr-triton."""
    result = [_facts(load_profile(name)) for name in profile_names()]
    if json_path != "-":
        for facts in result:
            click.echo(printable(f"{facts['name']:<18}{facts['title']}: {facts['checkpoint']}, {facts['licence']}"))
            click.echo(f"{'':<18}tasks: {', '.join(facts['tasks'])}")
            click.echo(f"{'':<18}modes: {', '.join(facts['modes'])}")
    write_json({"profiles": result}, json_path)


@click.command()
@click.argument("profile", metavar="[PROFILE]", required=False, shell_complete=PROFILES)
@json_option
def tasks(profile: str | None, json_path: str | None):
    """List what the models can be asked: `read --task`. PROFILE is a bundled one or a YAML file; all if left out.

    KEYs are placeholders, which `read --var KEY=VALUE` fills. The profile's default task is marked with *.
    """
    result = []
    for name in [profile] if profile else profile_names():
        chosen = load_profile(name)
        result += [{"profile": chosen.name, **task} for task in _tasks(chosen)]
    if json_path != "-":
        for task in result:
            least, most = task["images"]
            images = f"{least} image{'' if least == 1 else 's'}" if least == most else f"{least} to {most} images"
            keys = "".join(f", KEY {key}" for key in task["variables"])
            after = ", after a reading (--history)" if task["follow_up"] else ""
            mark = "*" if task["default"] else ""
            click.echo(f"{task['profile']:<18}{task['name'] + mark:<26}{images}, {task['answer']}{keys}{after}")
            click.echo(printable(f"{'':<44}{task['description']}"))
    write_json({"tasks": result}, json_path)


def task_names() -> list[str]:
    """Of all bundled profiles."""
    return sorted({task for name in profile_names() for task in load_profile(name).tasks})


def mode_names() -> list[str]:
    """Of all bundled profiles."""
    return sorted({mode for name in profile_names() for mode in load_profile(name).modes})


def _facts(profile: ModelProfile) -> dict:
    return {
        "name": profile.name,
        "title": profile.title,
        "checkpoint": profile.checkpoint_id,
        "licence": profile.licence.name,
        "non_commercial": profile.licence.non_commercial,
        "views": list(profile.views),
        "default_task": profile.default_task,
        "tasks": list(profile.tasks),
        "modes": list(profile.modes),
        "notice": profile.notice,
    }


def _tasks(profile: ModelProfile) -> list[dict]:
    return [
        {
            "name": name,
            "description": task.description,
            "answer": task.answer,
            "images": [task.min_images, task.max_images],
            "variables": list(task.placeholders),
            "follow_up": task.follow_up,
            "default": name == profile.default_task,
            "prompt": task.prompt,
        }
        for name, task in profile.tasks.items()
    ]
