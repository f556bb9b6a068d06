"""Windows of images to embeddings; the requests that Triton batches run as one batch of the vision graph.

A picture that was encoded before is not encoded again while there is room for its embeddings.
"""

import numpy as np
import triton_python_backend_utils as pb_utils

from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.pictures import PictureCache
from cxr_triton.triton_repo.adapter import error_response, parameters
from cxr_triton.triton_repo.drain import in_work

INPUTS = ("PIXEL_WINDOWS", "PATCH_ROWS_COLS", "VALID", "MERGE_ORDER")


class TritonPythonModel:
    def initialize(self, args):
        values = parameters(args)
        bundle = Bundle.open(values["bundle"], verify=False)
        session = bundle.open_vision(threads=int(values["threads"]) or None)
        self.session = PictureCache(session, int(values["picture_cache_mib"]) << 20)
        families = {
            "pictures_total": "Pictures that embeddings were asked for",
            "picture_hits_total": "Pictures that were not encoded, as they had been before",
        }
        counter = pb_utils.MetricFamily.COUNTER
        # A metric dies with its family.
        self.families = {
            name: pb_utils.MetricFamily(name=f"cxr_vision_{name}", description=description, kind=counter)
            for name, description in families.items()
        }
        self.metrics = {name: family.Metric(labels={}) for name, family in self.families.items()}

    def execute(self, requests):
        with in_work():
            return self.encode(requests)

    def encode(self, requests):
        try:
            inputs = [
                [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in INPUTS] for request in requests
            ]
            batch = [np.concatenate(tensors) for tensors in zip(*inputs, strict=True)]  # [B, W, ...] of all requests
            before = self.session.pictures, self.session.hits
            embeddings = self.session.encode(*batch)  # [B, T, hidden]
            self.metrics["pictures_total"].increment(self.session.pictures - before[0])
            self.metrics["picture_hits_total"].increment(self.session.hits - before[1])
        except Exception as error:
            if len(requests) == 1:
                return [error_response(error, requests[0])]
            # One that somebody sent past dicom_preprocess fails alone.
            return [response for request in requests for response in self.encode([request])]
        ends = np.cumsum([len(tensors[0]) for tensors in inputs])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("IMAGE_EMBEDDINGS", part)])
            for part in np.split(embeddings, ends)
        ]
