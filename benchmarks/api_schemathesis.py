"""
schemathesis over the OpenAPI document of a running server: no 5xx, no undocumented status.

    python benchmarks/api_schemathesis.py [--examples 300]
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from api_server import running

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# An event stream of a live job has no end, and closing the session is for browsers
SKIPPED = ("/training/{job_id}/events",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300, help="per operation and phase")
    args = parser.parse_args()
    with running(SB3_GRPO_RATE_LIMIT="0", SB3_GRPO_MAX_TOTAL_TIMESTEPS="2000", SB3_GRPO_QUEUE_LIMIT="20") as server:
        # Something to find
        server.wait(server.train(env_name="CartPole-v1", total_timesteps=500, n_steps=16, model_name="cartpole"))
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"http://127.0.0.1:{server.port}/openapi.json"]
        command += [
            "--checks",
            CHECKS,
            "--max-examples",
            str(args.examples),
            "--continue-on-failure",
            "--seed",
            "1",
            "--no-color",
        ]
        command += ["--phases", "examples,coverage,fuzzing", "--generation-allow-x00", "true"]
        for path in SKIPPED:
            command += ["--exclude-path", path]
        done = subprocess.run(command)
        assert server.call("GET", "/health")[0] == 200
        stumbles = re.findall(r"Traceback.*?\n\n", server.log.read_text(), re.DOTALL)
        print(f"exit status {done.returncode}, tracebacks in the server's log: {len(stumbles)}")
        print("\n".join(stumbles[:3]))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
