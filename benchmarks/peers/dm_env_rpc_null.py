"""dm_env_rpc's own server and connection around a null environment. Runs in a virtual environment with it.

`serve PORT` serves; `step PORT` reads a number of seconds on each line and prints the steps per second.
"""

import sys
import time
from concurrent import futures

import grpc
import numpy as np
from dm_env_rpc.v1 import connection, dm_env_rpc_pb2, dm_env_rpc_pb2_grpc, tensor_utils

ACTION, OBSERVATION, REWARD = 1, 1, 2


class NullService(dm_env_rpc_pb2_grpc.EnvironmentServicer):
    """The shortest honest answer to each message of the protocol."""

    def Process(self, requests, context):  # the name of the protocol
        observation = np.zeros(4, np.float32)
        for request in requests:
            response = dm_env_rpc_pb2.EnvironmentResponse()
            kind = request.WhichOneof("payload")
            if kind == "step":
                response.step.state = dm_env_rpc_pb2.EnvironmentStateType.RUNNING
                for uid in request.step.requested_observations:
                    value = observation if uid == OBSERVATION else np.float32(1.0)
                    response.step.observations[uid].CopyFrom(tensor_utils.pack_tensor(value))
            elif kind == "join_world":
                specs = response.join_world.specs
                specs.actions[ACTION].CopyFrom(
                    dm_env_rpc_pb2.TensorSpec(name="move", dtype=dm_env_rpc_pb2.DataType.INT32)
                )
                specs.observations[OBSERVATION].CopyFrom(
                    dm_env_rpc_pb2.TensorSpec(name="values", shape=[4], dtype=dm_env_rpc_pb2.DataType.FLOAT)
                )
                specs.observations[REWARD].CopyFrom(
                    dm_env_rpc_pb2.TensorSpec(name="reward", dtype=dm_env_rpc_pb2.DataType.FLOAT)
                )
            else:
                getattr(response, kind).SetInParent()
            yield response


def serve(port: int) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    dm_env_rpc_pb2_grpc.add_EnvironmentServicer_to_server(NullService(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


def step(port: int) -> None:
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    grpc.channel_ready_future(channel).result(20)
    line = connection.Connection(channel)
    line.send(dm_env_rpc_pb2.CreateWorldRequest())
    line.send(dm_env_rpc_pb2.JoinWorldRequest())
    print("ready", flush=True)
    for text in sys.stdin:
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < float(text):
            request = dm_env_rpc_pb2.StepRequest(requested_observations=[OBSERVATION, REWARD])
            request.actions[ACTION].CopyFrom(tensor_utils.pack_tensor(np.int32(1)))
            answer = line.send(request)
            tensor_utils.unpack_tensor(answer.observations[OBSERVATION])
            tensor_utils.unpack_tensor(answer.observations[REWARD])
            count += 1
        print(count / (time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[2])) if sys.argv[1] == "serve" else step(int(sys.argv[2]))
