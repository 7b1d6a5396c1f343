"""The interface of the tasks, classification and detection, for training and evaluation."""

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from timm.task import TrainingTask
from torch import Tensor, nn

from spd_zoo.data.labelled import DataError
from spd_zoo.models._detector import ObjectFinder
from spd_zoo.process import Process
from spd_zoo.training.classification.task import Classification
from spd_zoo.training.config import FinetuneConfig, Plan
from spd_zoo.training.detection.metrics import Suppression
from spd_zoo.training.detection.task import Detection
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.run import RunFolder
from spd_zoo.training.splits import DataT, Splits
from spd_zoo.training.steps import Batches, Steps

__all__ = ["Predictions", "Task", "names_other_task", "score_of", "task_of"]


class Predictions(Protocol):
    """The predictions of a network for the images of a split."""

    def summary(self) -> dict[str, Any]:
        """All figures by name; `images` is their number."""

    def per_class(self) -> list[dict[str, Any]]:
        """The figures of each class."""

    def columns(self) -> dict[str, Any]:
        """The columns of the results table."""

    def headline(self) -> str:
        """The most important figures."""

    def in_words(self) -> str:
        """All figures on one line."""

    def notes(self) -> list[str]:
        """What the figures leave out, a line for each."""

    def write_tables(self, folder: Path, suffix: str = "") -> None:
        """Writes the figures of each class, and for classifiers the confusion matrix, as CSV."""


class Task(Protocol[DataT]):
    """Everything that differs between training classifiers and training detectors.

    Attributes:
        networks: Name of the task's networks, in the plural.
        metric: The column of `metrics.csv` that early stopping compares; larger is better.
    """

    networks: str
    metric: str

    def defaults(self, config: FinetuneConfig, net: Any, batch_size: int, pretrained: bool) -> dict[str, Any]:
        """The values of options that depend on the task, where the request leaves them out.

        Args:
            config: The request.
            net: The network, perhaps on torch's meta device.
            batch_size: Images per step.
            pretrained: Whether training starts from pretrained weights.

        Raises:
            ValueError: If an option has no meaning for the network.
        """

    def open_splits(
        self, config: FinetuneConfig, net: Any, process: Process, began_with: dict[str, Any] | None
    ) -> Splits[DataT]:
        """Opens, splits and checks the data of a run.

        Args:
            config: Where the data is, and how much of it is held out.
            net: The network, perhaps on torch's meta device.
            process: This process.
            began_with: For a resumed run, the recorded facts about its data, which is then not checked again.

        Raises:
            DataError: If the data cannot be used, or is not what the run began with.
            ValueError: If the run's folder lies in the data.
        """

    def write_data_report(self, folder: RunFolder, config: FinetuneConfig, net: Any, splits: Splits[DataT]) -> None:
        """Writes what is trained on, when a run begins.

        Args:
            folder: The run.
            config: Its configuration.
            net: The network, perhaps on torch's meta device.
            splits: The data as `open_splits` returns it.
        """

    def open_split(self, data: str | Path, split: str, image_column: str = "", label_column: str = "") -> DataT | None:
        """The images of a split.

        Args:
            data: The data set.
            split: The split: train, val, test, or a name of the data set's own.
            image_column: For classifiers, the column with the images.
            label_column: For classifiers, the column with the labels.

        Returns:
            The images; None if there is no split of that name.

        Raises:
            DataError: If the data cannot be read.
        """

    def warnings(self, data: DataT) -> list[str]:
        """Problems of labels or boxes that do not prevent their use."""

    def training(self, net: Any, plan: Plan, data: DataT, process: Process) -> TrainingTask:
        """The network with its loss.

        Args:
            net: The network.
            plan: What the run does.
            data: The training images.
            process: This process.

        Returns:
            timm's task: images and targets -> a dict with `loss` and perhaps its `terms`.
        """

    def init_head(self, net: Any, plan: Plan, data: DataT, process: Process, preprocessing: Preprocessing) -> bool:
        """Gives the classifier of a new run its first weights.

        Args:
            net: The network, with pretrained weights if the plan says so.
            plan: What the run does.
            data: The training images.
            process: This process.
            preprocessing: How pixels become the network's input.

        Returns:
            Whether the network knows the classes, so that evaluating it has a meaning.
        """

    def preparation(
        self, config: FinetuneConfig, preprocessing: Preprocessing, classes: int
    ) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
        """A function that converts pixels and targets to inputs of the network and of the loss, on the device."""

    def train_batches(
        self,
        net: Any,
        data: DataT,
        image_size: tuple[int, int],
        steps: Steps,
        config: FinetuneConfig,
        preprocessing: Preprocessing,
    ) -> Batches:
        """The training images, augmented, in the order of `steps`.

        Args:
            net: The network.
            data: The training images.
            image_size: Height and width of the inputs.
            steps: The images of each step.
            config: Augmentation and worker processes.
            preprocessing: How pixels become the network's input.

        Returns:
            Batches of pixels and targets.
        """

    def eval_batches(
        self,
        net: Any,
        data: DataT,
        image_size: tuple[int, int],
        batch_size: int,
        workers: int,
        preprocessing: Preprocessing,
        process: Process,
    ) -> Batches:
        """This process's share of the images, in order.

        Args:
            net: The network.
            data: The images.
            image_size: Height and width of the inputs.
            batch_size: Images per batch.
            workers: Processes that read images.
            preprocessing: How pixels become the network's input.
            process: This process.

        Returns:
            Batches of pixels and targets.
        """

    def score(self, net: Any, batches: Batches, preprocessing: Preprocessing, process: Process) -> dict[str, float]:
        """The metrics of an epoch.

        Args:
            net: The network.
            batches: As `eval_batches` returns them.
            preprocessing: How pixels become the network's input.
            process: This process; the others evaluate the rest of the images.

        Returns:
            The metrics by their columns in `metrics.csv`.
        """

    def predict(
        self,
        net: Any,
        batches: Batches,
        data: DataT,
        image_size: tuple[int, int],
        preprocessing: Preprocessing,
        process: Process,
        flip: bool = False,
        suppression: Suppression | None = None,
    ) -> Any:
        """The predictions for all images.

        Args:
            net: The network.
            batches: As `eval_batches` returns them.
            data: The images.
            image_size: Height and width of the inputs.
            preprocessing: How pixels become the network's input.
            process: This process; the others evaluate the rest of the images.
            flip: Average over every image and its mirror image.
            suppression: How a detector's boxes suppress each other.

        Returns:
            `Predictions`, as `write_report` takes them.
        """

    def epoch_in_words(self, row: dict[str, Any]) -> str:
        """The most important metrics of an epoch, a row of `metrics.csv`."""

    def epoch_notes(self, row: dict[str, Any]) -> list[str]:
        """What is wrong with an epoch, a row of `metrics.csv`, a line for each."""

    def pretrained_cfg(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """Fields of a trained network's config that describe its preprocessing."""

    def write_report(
        self,
        folder: RunFolder,
        config: FinetuneConfig,
        history: list[dict[str, Any]],
        predictions: Any,
        data: DataT,
        notes: Sequence[str],
    ) -> None:
        """Writes the report of a run with its tables and figures.

        Args:
            folder: The run.
            config: Its configuration.
            history: The rows of `metrics.csv`.
            predictions: As `predict` returns them.
            data: The images that were evaluated.
            notes: What was guessed or left out.
        """

    def check_evaluation(
        self, net: nn.Module, model: str, only_classifiers: bool, suppression: Suppression | None = None
    ) -> None:
        """Checks that the network and the options are valid for an evaluation.

        Args:
            net: The network.
            model: Its name, for the message.
            only_classifiers: Whether options are set that only classifiers have.
            suppression: Options that only detectors have, if any is set.

        Raises:
            ModelError: If the network cannot be evaluated.
            ValueError: If an option has no meaning.
        """

    def result_columns(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """The columns of the results table that describe the preprocessing."""


def task_of(net: nn.Module) -> Task[Any]:
    """The task of a network."""
    return Detection() if isinstance(net, ObjectFinder) else Classification()


def score_of(task: Task[Any], row: dict[str, Any]) -> float:
    """The metric that counts, of a row of `metrics.csv`; -1 if the network of then is not finite or found nothing."""
    score: float = row[task.metric]
    return score if math.isfinite(score) and math.isfinite(row["val_loss"]) else -1.0


@contextmanager
def names_other_task(task: Task[Any], data: str | Path, command: str) -> Iterator[None]:
    """Adds to an error of opening `data` which networks take it, if those of the other task do.

    Args:
        task: The task of the network.
        data: What is opened.
        command: The command or function that opens it, for the advice.

    Raises:
        DataError: If the data cannot be opened.
    """
    try:
        yield
    except DataError as error:
        boxes = isinstance(task, Classification)
        other: Task[Any] = Detection() if boxes else Classification()
        if "://" in str(data) or _opens(task, data) or not _opens(other, data):
            raise
        found = "boxes, which detectors take" if boxes else "class folders, which classifiers take"
        network = ("yolov8n_spd" if boxes else "tf_efficientnet_lite0_spd") if command == "finetune" else "RUN"
        out = " --out RUN" if command == "finetune" else ""
        example = f"`spd-zoo {command} {network} --data {shlex.quote(str(data))}{out}`"
        raise DataError(f"{error}; it has {found}, as in {example}") from error


def _opens(task: Task[Any], data: str | Path) -> bool:
    """Whether a task finds its images in `data`; of folders for classes there are several."""
    least = 2 if isinstance(task, Classification) else 1
    for split in ("train", "val", "test"):
        try:
            found = task.open_split(data, split)
        except DataError:
            continue
        if found is not None and len(found.class_names) >= least:
            return True
    return False
