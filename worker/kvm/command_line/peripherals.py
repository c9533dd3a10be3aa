"""What is plugged in beside the rest. It comes last, so that switching it on moves no disk or card to another slot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hostler.hvparams import HvParams
from worker.kvm.command_line.display import has_display
from worker.kvm.command_line.options import Option

INPUT_DEVICES = {"tablet": "usb-tablet", "mouse": "usb-mouse", "keyboard": "usb-kbd"}
SOUND_CARDS = {"ac97": "AC97", "es1370": "ES1370", "hda": "hda-duplex", "sb16": "sb16"}


def usb(hvparams: HvParams) -> Iterator[Option]:
    """The pointer on USB 1, which every guest has drivers for; further devices on USB 3, which has the speed."""
    pointer = hvparams.usb_mouse or ("tablet" if has_display(hvparams) else "")
    if pointer:
        yield "-device", {"driver": "piix3-usb-uhci", "id": "usb"}
        yield "-device", {"driver": INPUT_DEVICES[pointer], "id": "pointer0", "bus": "usb.0"}
    if hvparams.usb_devices:
        yield "-device", {"driver": "qemu-xhci", "id": "xhci"}
    for index, spec in enumerate(hvparams.usb_devices):
        yield "-device", _usb_device(spec) | {"id": f"usb-device{index}", "bus": "xhci.0"}


def sound(hvparams: HvParams) -> Iterator[Option]:
    """A sound card, played through SPICE or to nobody."""
    if hvparams.soundhw:
        yield "-audiodev", {"driver": "spice" if hvparams.spice_bind else "none", "id": "audio0"}
        if hvparams.soundhw == "hda":
            yield "-device", {"driver": "intel-hda", "id": "hda"}
        bus = {"bus": "hda.0"} if hvparams.soundhw == "hda" else {}
        yield "-device", {"driver": SOUND_CARDS[hvparams.soundhw], "id": "sound0", **bus, "audiodev": "audio0"}


def balloon(hvparams: HvParams) -> Iterator[Option]:
    """A balloon through which the guest reports the memory it has free, to be used elsewhere."""
    if hvparams.balloon:
        yield "-device", {"driver": "virtio-balloon-pci", "id": "balloon0", "free-page-reporting": True}


def _usb_device(spec: str) -> dict[str, Any]:
    if spec in INPUT_DEVICES:
        return {"driver": INPUT_DEVICES[spec]}
    _, vendor, product = spec.split(":")
    return {"driver": "usb-host", "vendorid": int(vendor, 16), "productid": int(product, 16)}
