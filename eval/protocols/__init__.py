"""Presets, one small file a protocol. A new one is a file here and a line below."""

from eval.fvd import ClipProtocol
from eval.protocol import Protocol
from eval.protocols.adm import ADM
from eval.protocols.classifier import CLASSIFIER
from eval.protocols.clean_fid import CLEAN_FID
from eval.protocols.cmmd import CMMD
from eval.protocols.common_metrics import COMMON_METRICS
from eval.protocols.density_coverage import DENSITY_COVERAGE
from eval.protocols.fd_dinov2 import FD_DINOV2
from eval.protocols.frame_fid import FRAME_FID
from eval.protocols.larp import LARP, LARP_RECONSTRUCTION
from eval.protocols.llamagen_rfid import LLAMAGEN_RFID
from eval.protocols.mar import MAR
from eval.protocols.pytorch_fid import PYTORCH_FID
from eval.protocols.seed_voken_rfid import SEED_VOKEN_RFID
from eval.protocols.seed_voken_video import SEED_VOKEN_VIDEO
from eval.protocols.standins import I3D2D, RC512
from eval.protocols.stylegan_v import STYLEGAN_V, STYLEGAN_V_128, STYLEGAN_V_EVERY_8TH
from eval.protocols.titok_rfid import TITOK_RFID
from eval.protocols.torch_fidelity import TORCH_FIDELITY
from eval.protocols.videogpt import VIDEOGPT

GENERATION = (ADM, TORCH_FIDELITY, MAR, PYTORCH_FID, CLEAN_FID, FD_DINOV2, CMMD, DENSITY_COVERAGE)  # "all"
RECONSTRUCTION = (LLAMAGEN_RFID, TITOK_RFID, SEED_VOKEN_RFID)  # "all-reconstruction"
PICTURES: dict[str, Protocol] = {
    protocol.name: protocol for protocol in (*GENERATION, *RECONSTRUCTION, CLASSIFIER, RC512, I3D2D)
}
CLIPS: dict[str, ClipProtocol] = {
    protocol.name: protocol
    for protocol in (
        LARP,
        LARP_RECONSTRUCTION,
        STYLEGAN_V,
        STYLEGAN_V_128,
        STYLEGAN_V_EVERY_8TH,
        VIDEOGPT,
        SEED_VOKEN_VIDEO,
        COMMON_METRICS,
        FRAME_FID,
    )
}
