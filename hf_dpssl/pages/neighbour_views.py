"""A set of pictures in the eyes of an encoder: nearest neighbours of a picture, and its place on a 2-D map."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.manifold import TSNE
from torch import Tensor

from ..data.image_data import load_images
from ..data.image_table import ImageTable
from ..embedding.embedder import ImageEmbedder
from ..evaluation import nearest_neighbours
from .map_page import write_map_page

THUMBNAIL = 48  # pixels
_BATCH = 64


class PictureBank:
    """Held-out pictures of a data set, drawn at random, with their classes.

    Args:
        dataset: as `data.load_images` takes it.
        count: at most so many pictures.

    Attributes:
        pictures: N RGB pictures; thumbnails: uint8 (N, 3, 48, 48); labels: N classes, -1 without one; class_names.

    Raises:
        ValueError, FileNotFoundError: as `load_images`.
    """

    def __init__(self, dataset: str = "digits", count: int = 500):
        data = load_images(dataset)
        split = data.train if data.evaluation is None else data.evaluation
        rows = data.random_rows(split, count)
        size = data.entry.image_size or THUMBNAIL
        table = ImageTable(data, split.select(rows), size, on_bad_image="skip")
        table.preload(2**30, show_progress=False)
        if table.images is None:
            raise ValueError(f"{count} pictures of {size} pixels do not fit into memory: take fewer.")
        self.dataset = dataset
        self.labels = table.labels.tolist()
        self.class_names = list(data.class_names or [])
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in table.images]
        self.thumbnails = table.images

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        """Class of picture `index`, or its number."""
        label = self.labels[index]
        return self.class_names[label] if label >= 0 and self.class_names else f"picture {index}"


class EncoderView:
    """An encoder's features of a bank of pictures, and a map of them.

    The map is the encoder's own where its head has two dimensions, else t-SNE of the features.

    Args:
        source: folder or Hub id, `id@revision`.
        bank: the pictures.
    """

    def __init__(self, source: str, bank: PictureBank):
        self.bank = bank
        self.embedder = ImageEmbedder(source)
        self.features = self._embed(self.embedder)
        self.head = _two_dimensional_head(source)
        if self.head is not None:
            self.places = self._embed(self.head)
        else:
            perplexity = min(30.0, (len(bank) - 1) / 4)
            places = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(self.features.numpy())
            self.places = torch.from_numpy(places)

    def _embed(self, embedder: ImageEmbedder) -> Tensor:
        pictures = self.bank.pictures
        return torch.cat([embedder.embed_pictures(pictures[i : i + _BATCH]) for i in range(0, len(pictures), _BATCH)])

    @property
    def map_name(self) -> str:
        """How the map was made."""
        return "the encoder's own 2-D head" if self.head is not None else "t-SNE of its features"

    def neighbours(self, picture: Image.Image, k: int) -> tuple[list[int], list[float]]:
        """Indices in the bank and cosines of the k nearest pictures, best first."""
        similarities, indices = nearest_neighbours(self.features, self.embedder.embed_pictures([picture]), k=k)
        return indices[0].tolist(), similarities[0].tolist()

    def place(self, picture: Image.Image) -> Tensor:
        """(2,) where the picture stands on the map: by the head, or amid its five nearest neighbours."""
        if self.head is not None:
            return self.head.embed_pictures([picture])[0]
        indices, similarities = self.neighbours(picture, min(5, len(self.bank)))
        return torch.tensor(similarities).mul(50).softmax(0) @ self.places[indices].float()

    def map_page(self, picture: Image.Image | None, title: str) -> str:
        """The interactive map as an HTML page, with the picture on it, ringed, where one is given."""
        bank = self.bank
        places = self.places
        thumbnails = self.bank.thumbnails
        names = [f"picture {i}" for i in range(len(bank))]
        labels = list(bank.labels)
        classes = list(bank.class_names)
        marked = None
        if picture is not None:
            marked = len(bank)
            side = thumbnails.shape[-1]
            pixels = torch.from_numpy(np.asarray(picture.resize((side, side))).copy()).permute(2, 0, 1)
            thumbnails = torch.cat([thumbnails, pixels[None]])
            places = torch.cat([places, self.place(picture)[None]])
            names = [*names, "your picture"]
            labels = [*labels, -1]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "map.html"
            write_map_page(
                path,
                {self.map_name: places.numpy()},
                thumbnails,
                names=names,
                labels=labels,
                class_names=classes,
                held_out=[i < len(bank) for i in range(len(names))],
                title=title,
                marked=marked,
            )
            return path.read_text(encoding="utf-8")


def _two_dimensional_head(source: str) -> ImageEmbedder | None:
    try:
        head = ImageEmbedder(source, kind="embeddings")
    except (ValueError, OSError):  # no head
        return None
    return head if head.dimension == 2 else None
