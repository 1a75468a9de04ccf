"""What a file says of how its image came to be, read without the code under test: XMP by ElementTree."""

from __future__ import annotations

import io
from xml.etree import ElementTree

from PIL import Image

_DESCRIPTION = (
    "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}RDF/{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
)
# As IPTC's Photo Metadata Standard and Adobe's XMP specification, part 1, have them.
SOURCE_TYPE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
CREATOR_TOOL = "{http://ns.adobe.com/xap/1.0/}CreatorTool"
TRAINED_MEDIA = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
EDITED_MEDIA = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
DRAWN = {SOURCE_TYPE: TRAINED_MEDIA, CREATOR_TOOL: "cat-cluster"}
EDITED = {**DRAWN, SOURCE_TYPE: EDITED_MEDIA}


def said_in_xmp(packet: bytes) -> dict[str, str]:
    """The simple properties of an XMP packet."""
    (description,) = ElementTree.fromstring(packet).findall(_DESCRIPTION)
    return {element.tag: element.text or "" for element in description}


def xmp_of(data: bytes) -> bytes:
    """The XMP packet of an image file, as Pillow finds it."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        packet: bytes | str = image.info["xmp"]
    return packet.encode() if isinstance(packet, str) else packet
