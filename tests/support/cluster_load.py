"""Runs in a pod, with Python alone: URL MODEL CLIENTS ask for pictures until /tmp/stop is there, then print a tally."""

import base64
import collections
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

URL, MODEL, CLIENTS = sys.argv[1], sys.argv[2], int(sys.argv[3])
KEY = base64.b64decode(os.environ["KEYS"]).decode()
PATIENCE = 180  # seconds
answers: collections.Counter = collections.Counter()
slowest = 0.0
problems: list = []  # when it began, in UTC, seconds, and what
lock = threading.Lock()


def ask(seed: int) -> str:
    body = {"model": MODEL, "prompt": "a picture of a sks cup", "seed": seed, "num_inference_steps": 4}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(URL + "/v1/images/generations", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            image = json.load(reply)["data"][0]["b64_json"]
            return "200" if base64.b64decode(image).startswith(b"\x89PNG") else "no picture"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read(200)!r} Retry-After {error.headers.get('Retry-After')}"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__} {error}"


def client(number: int) -> None:
    global slowest
    seed = number
    while not Path("/tmp/stop").exists():
        began, clock = time.monotonic(), time.strftime("%H:%M:%S")
        answer = ask(seed)
        took = time.monotonic() - began
        with lock:
            answers[answer] += 1
            if answer != "200" and len(problems) < 20:
                problems.append([clock, round(took, 1), answer])
            slowest = max(slowest, took)
        seed += CLIENTS
        time.sleep(0.2)


# A pod's address is let through by the policies some seconds after it starts: until then nothing counts.
while (answer := ask(0)) != "200":
    print(json.dumps({"not yet": answer}), flush=True)
    time.sleep(1)
print(json.dumps({"first": answer}), flush=True)
threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps({"answers": answers, "slowest": round(slowest, 1), "problems": problems}), flush=True)
