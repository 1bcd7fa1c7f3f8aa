"""Models with nothing wrong: the plain policy is safe and no op may be accused."""

import copy

import torch
from audit_corpus.cases import LARGE, Program, healthy
from audit_corpus.in_range import regression, squares
from audit_corpus.models import bert, llama, mixtral, padded, t5, tokens, vit
from torch import nn
from torch.nn import functional as F


def classes(model, batch):
    x, y = batch
    return F.cross_entropy(model(x).float(), y)


@healthy
def multilayer_perceptron():
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
    return Program(model, regression(), squares)


@healthy
def convolutions_with_batch_norm():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip
    return Program(model.train(), (torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,))), classes)


@healthy
def long_short_term_memory():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm, self.head = nn.Embedding(50, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 3)

        def forward(self, ids):
            return self.head(self.lstm(self.embed(ids))[0][:, -1])

    return Program(Reader(), (torch.randint(0, 50, (6, 20)), torch.randint(0, 3, (6,))), classes)


@healthy(settings=LARGE)
def gpt2():
    import zoo

    return Program(zoo.gpt2(), zoo.text(0))


@healthy(settings=LARGE)
def llama_with_sdpa():
    return Program(llama("sdpa"), tokens())


@healthy(settings=LARGE)
def llama_eager_with_padding():
    batch = tokens()
    batch["attention_mask"][1, 8:] = 0
    batch["labels"][1, 8:] = -100
    return Program(llama("eager"), batch)


@healthy(settings=LARGE)
def bert_with_padding():
    return Program(bert(), padded())


@healthy(settings=LARGE)
def t5_encoder_decoder():
    return Program(t5(), tokens())


@healthy(settings=LARGE)
def vision_transformer():
    return Program(vit(), {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([1, 3])})


@healthy(settings=LARGE)
def mixture_of_experts():
    return Program(mixtral(), tokens())


@healthy(settings=LARGE)
def qwen3_vl():
    import zoo

    return Program(zoo.qwen3_vl(), zoo.seen_text(0))


@healthy
def u_net():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
            self.inner = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.SiLU())
            self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
            self.out = nn.Conv2d(16, 1, 3, padding=1)

        def forward(self, x):
            skip = self.down(x)
            return self.out(torch.cat([skip, self.up(self.inner(skip))], 1))

    return Program(Net(), (torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16)), squares)


@healthy
def variational_autoencoder():
    class Vae(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(16, 8), nn.Linear(4, 16)

        def forward(self, x):
            mean, log_variance = self.encode(x).chunk(2, -1)
            z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, dtype=mean.dtype, device=mean.device)
            kl = 0.5 * (mean.float().pow(2) + log_variance.float().exp() - 1 - log_variance.float()).mean()
            return {"loss": F.mse_loss(self.decode(z).float(), x.float()) + 0.1 * kl}

    return Program(Vae(), {"x": torch.randn(32, 16)})


@healthy
def contrastive_with_a_temperature():
    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = nn.Linear(16, 32), nn.Linear(8, 32)
            self.temperature = nn.Parameter(torch.tensor(2.659))

        def forward(self, images, texts):
            a, b = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
            logits = (self.temperature.exp() * a @ b.T).float()
            at = torch.arange(len(logits), device=logits.device)
            return {"loss": (F.cross_entropy(logits, at) + F.cross_entropy(logits.T, at)) / 2}

    return Program(Clip(), {"images": torch.randn(16, 16), "texts": torch.randn(16, 8)})


@healthy
def adversarial_losses():
    class Gan(nn.Module):
        def __init__(self):
            super().__init__()
            self.generate = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 8), nn.Tanh())
            self.judge = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

        def forward(self, noise, real):
            fake, true = self.judge(self.generate(noise)).float(), self.judge(real).float()
            return {"loss": F.softplus(-true).mean() + F.softplus(fake).mean() + 0.1 * F.softplus(-fake).mean()}

    return Program(Gan(), {"noise": torch.randn(32, 4), "real": torch.randn(32, 8)})


@healthy(settings=LARGE)
def tied_weights():
    import zoo

    torch.manual_seed(0)
    return Program(zoo.TiedLanguageModel(), zoo.shifted_text(0))


@healthy
def dropout_in_training():
    model = nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 32), nn.Dropout(0.2), nn.Linear(32, 1)
    )
    return Program(model.train(), regression(), squares)


@healthy(settings=(("bf16", "mixed", "a100-40gb"), ("bf16", "true", "cpu"), ("fp16", "mixed", "cpu")))
def attention_with_masks_of_minus_1e9():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.qkv, self.out = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(16, 1)

        def forward(self, x):
            q, k, v = self.qkv(self.stem(x)).chunk(3, -1)
            scores = (q @ k.transpose(1, 2) / 4).float()
            hidden = torch.ones(x.shape[1], x.shape[1], device=x.device).triu(1)
            least = torch.finfo(scores.dtype).min
            half = scores.shape[0] // 2
            scores = torch.cat([scores[:half] + hidden * -1e9, scores[half:].masked_fill(hidden.bool(), least)])
            return self.out(torch.softmax(scores, -1).to(v.dtype) @ v)

    return Program(Masked(), (torch.randn(4, 10, 8), torch.randn(4, 10, 1)), squares)


@healthy
def teacher_and_student():
    class Distil(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)
            with torch.no_grad():
                self.teacher[0].weight.add_(0.3 * torch.randn(32, 8))

        def forward(self, x):
            with torch.no_grad():
                goal = (self.teacher(x).float() / 2).softmax(-1)
            return {"loss": F.kl_div((self.student(x).float() / 2).log_softmax(-1), goal, reduction="batchmean") * 4}

    return Program(Distil(), {"x": torch.randn(32, 8)})


@healthy
def policy_gradient():
    class Agent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.actor, self.critic = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 1)

        def forward(self, state, action, reward):
            h = torch.tanh(self.body(state))
            chosen = self.actor(h).float().log_softmax(-1).gather(-1, action[:, None])[:, 0]
            value = self.critic(h).float()[:, 0]
            advantage = (reward.float() - value).detach()
            return {"loss": -(chosen * advantage).mean() + 0.5 * (reward.float() - value).pow(2).mean()}

    batch = {"state": torch.randn(64, 8), "action": torch.randint(0, 4, (64,)), "reward": torch.randn(64)}
    return Program(Agent(), batch)
