"""Measure a stage on this machine or cluster, from a checkout: the programs are in benchmarks/.

python -m ray_jobs.benchmark extract --source my_photos/ --images 2000
python -m ray_jobs.benchmark train --features runs/flickr8k/features
python -m ray_jobs.benchmark serve --model runs/flickr8k/model --images my_photos/ --csv serve.csv
"""

from functools import partial

from captioner.runtime import command_line


def main() -> None:
    try:
        from benchmarks.programs import PROGRAMS, measure
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", "benchmarks.programs"):
            raise
        command_line.fail("benchmark: there is no benchmarks/ here; run it from a checkout")
    about = {name: config_type.__doc__ or "" for name, (_, config_type) in PROGRAMS.items()}
    name = command_line.take_name("captioner benchmark", about)
    command_line.run(partial(measure, name), PROGRAMS[name][1])


if __name__ == "__main__":
    main()
