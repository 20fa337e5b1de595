"""mmctr from Python, in five uses of a few lines each, over the folder that `make demo` writes.

python docs/examples/python_api.py demo
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

import mmctr

demo = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")

# --8<-- [start:embed]
encoder = mmctr.load(demo / "pretrain")
photo = Image.new("RGB", (200, 150), "red")
as_bytes = io.BytesIO()
photo.save(as_bytes, "JPEG")
vectors = encoder.embed(images=[photo, as_bytes.getvalue(), None], texts=["red circle", None, "blue square"])
# --8<-- [end:embed]
print(f"embed: {vectors.shape[0]} items, {vectors.shape[1]} dimensions")

# --8<-- [start:search]
search = mmctr.load(demo / "embeddings")
by_words = search.search(text="red striped circle", k=5)
by_picture_and_item = search.search(image=photo, item_id=by_words[0].item_id, k=5)
by_vector = search.search(vector=vectors[2], k=5, where=[])
# --8<-- [end:search]
for neighbour in by_words:
    print(f"search: {neighbour.score:.3f} {neighbour.item_id} {neighbour.title}")

# --8<-- [start:rank]
ranker = mmctr.load(demo / "din_table")
known_user = ranker.dataset.users["user_id"][0].as_py()
best = ranker.rank(user_id=known_user, k=3)
clicked = [item_id for item_id, _ in best]
scores = ranker.score(ranker.cold_item_ids[:4], history=clicked)  # a user nobody knows, and items never clicked
# --8<-- [end:rank]
print(f"rank: the best of user {known_user}: {best}")
print(f"score: four cold items for a new user: {scores.round(3)}")

# --8<-- [start:compare]
comparison = mmctr.compare(demo / "din_id", demo / "din_table")
cold = comparison.to_json()["runs"][1]["test"]["cold"]["gauc"]
comparison.write_html(demo / "two_runs.html")
# --8<-- [end:compare]
print(f"compare: cold gAUC of the second run {cold:.3f}")

# --8<-- [start:train]
changes = [f"data.path={demo / 'data'}", f"run_dir={demo / 'lr_from_python'}", "fit.epochs=1"]
config = mmctr.FinetuneConfig.load("configs/finetune/toy_lr_id.yaml", changes)
trained = mmctr.train(config)
metrics = mmctr.RunFolder(trained.run).read_metrics()
# --8<-- [end:train]
print(f"train: test AUC of a logistic regression after one epoch {metrics['test']['all']['auc']:.3f}")
