SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;
SET default_tablespace = '';
SET default_table_access_method = heap;
CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.aliases (
    owner character varying(64) NOT NULL,
    name character varying(256) NOT NULL,
    targets json NOT NULL,
    is_shared boolean NOT NULL,
    created double precision NOT NULL
);
CREATE TABLE public.files (
    id character varying(64) NOT NULL,
    owner character varying(64) NOT NULL,
    filename text NOT NULL,
    purpose character varying(64) NOT NULL,
    num_bytes bigint NOT NULL,
    sha256 character varying(64) NOT NULL,
    num_rows bigint,
    form character varying(32),
    created double precision NOT NULL
);
CREATE TABLE public.job_events (
    number bigint NOT NULL,
    id character varying(64) NOT NULL,
    job character varying(64) NOT NULL,
    created double precision NOT NULL,
    level character varying(16) NOT NULL,
    kind character varying(16) NOT NULL,
    message text NOT NULL,
    data json NOT NULL
);
CREATE SEQUENCE public.job_events_number_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.job_events_number_seq OWNED BY public.job_events.number;
CREATE TABLE public.jobs (
    id character varying(64) NOT NULL,
    owner character varying(64) NOT NULL,
    status character varying(32) NOT NULL,
    model text NOT NULL,
    suffix character varying(64),
    training_file character varying(64) NOT NULL,
    validation_file character varying(64),
    settings json NOT NULL,
    outcome json NOT NULL,
    fine_tuned_model character varying(256),
    created double precision NOT NULL,
    started double precision,
    finished double precision
);
CREATE TABLE public.keys (
    id character varying(64) NOT NULL,
    name text NOT NULL,
    hash character varying(64) NOT NULL,
    beginning character varying(16) NOT NULL,
    is_admin boolean NOT NULL,
    created double precision NOT NULL,
    revoked double precision,
    limits json NOT NULL
);
CREATE TABLE public.prompts (
    id character varying(64) NOT NULL,
    owner character varying(64) NOT NULL,
    name character varying(256) NOT NULL,
    folder text,
    source character varying(32) NOT NULL,
    job character varying(64),
    is_shared boolean NOT NULL,
    is_pinned boolean NOT NULL,
    created double precision NOT NULL
);
ALTER TABLE ONLY public.job_events ALTER COLUMN number SET DEFAULT nextval('public.job_events_number_seq'::regclass);
INSERT INTO public.alembic_version VALUES ('0001');
INSERT INTO public.aliases VALUES ('key-f757a2c9196adba721d8a4d1', 'helper', '{"targets": [{"model": "coach", "share": 1.0}]}', false, 1795932277.41262);
INSERT INTO public.files VALUES ('file-9d37177e6bed75424201e541909fd158', 'key-f757a2c9196adba721d8a4d1', 'rows.jsonl', 'fine-tune', 299, '266beff11ff0fe1ff3317882a6a72131b706c0984aaa6bca5f5aa23bee18ba9f', 8, 'plain', 1795932277.4251084);
INSERT INTO public.files VALUES ('file-3b70e1991fb1cc530cbb3aad0f24f471', 'key-f757a2c9196adba721d8a4d1', 'step_metrics.csv', 'fine-tune-results', 138, '597ae269899c44def6a9a63d97be97f5f15fc1b164eba3bb2c2cc19806d2d4fc', NULL, NULL, 1795932277.6417055);
INSERT INTO public.job_events VALUES (1, 'ftevent-33d229cfb26a4ec89e0190ce', 'ftjob-259719b097b84c1aa5b89cff', 1795932277.4395661, 'info', 'message', 'the job is queued, to train on file-9d37177e6bed75424201e541909fd158', '{}');
INSERT INTO public.job_events VALUES (2, 'ftevent-4e82c3eb26d748418dda3bdb', 'ftjob-259719b097b84c1aa5b89cff', 1795932277.4501467, 'info', 'message', 'reading the files', '{}');
INSERT INTO public.job_events VALUES (3, 'ftevent-f3802ef212e345e1ad0e67d7', 'ftjob-259719b097b84c1aa5b89cff', 1795932277.5216315, 'info', 'message', 'training begins: 2 steps', '{}');
INSERT INTO public.job_events VALUES (4, 'ftevent-faf0efbb12574aae9295d5b0', 'ftjob-259719b097b84c1aa5b89cff', 1795932277.5216315, 'info', 'message', 'no validation rows: the last step is kept', '{}');
INSERT INTO public.job_events VALUES (5, 'ftevent-89cdd6a0996c4d6d82a7d411', 'ftjob-259719b097b84c1aa5b89cff', 1795932277.5216315, 'info', 'message', 'rows run packed behind one pass of the soft prompt', '{}');
INSERT INTO public.job_events VALUES (6, 'ftevent-58bddc855b014909a7b54204', 'ftjob-259719b097b84c1aa5b89cff', 1795932277.553896, 'info', 'metrics', 'step 1 of 2, training loss 5.1090', '{"step": 1, "total_steps": 2, "train_loss": 5.1090420209444485, "learning_rate": 0.07751651466544163, "epoch": 0.5}');
INSERT INTO public.job_events VALUES (7, 'ftevent-a97e29612c7648978a46319b', 'ftjob-259719b097b84c1aa5b89cff', 1795932277.553896, 'info', 'metrics', 'step 2 of 2, training loss 5.1901', '{"step": 2, "total_steps": 2, "train_loss": 5.190138311947093, "learning_rate": 0.07751651466544163, "epoch": 1.0}');
INSERT INTO public.job_events VALUES (8, 'ftevent-ace72b37fc3b424da94bc096', 'ftjob-259719b097b84c1aa5b89cff', 1795932277.6442816, 'info', 'message', 'step 2 is kept, and served as ft:base:epochs-1:ftjob-259719b097b84c1aa5b89cff', '{}');
INSERT INTO public.job_events VALUES (9, 'ftevent-b51f2c29485a41e5aa9d9285', 'ftjob-8612b5e58f094b3f9db61a51', 1795932277.6508777, 'info', 'message', 'the job is queued, to train on file-9d37177e6bed75424201e541909fd158', '{}');
INSERT INTO public.job_events VALUES (10, 'ftevent-3b9244314ee148fc8e7551c5', 'ftjob-8612b5e58f094b3f9db61a51', 1795932277.6627297, 'info', 'message', 'reading the files', '{}');
INSERT INTO public.job_events VALUES (11, 'ftevent-ee44492b27c54cb88c9617c4', 'ftjob-8612b5e58f094b3f9db61a51', 1795932277.7134407, 'info', 'message', 'training begins: 60 steps', '{}');
INSERT INTO public.job_events VALUES (12, 'ftevent-fa76f00223b44f0aaea39f20', 'ftjob-8612b5e58f094b3f9db61a51', 1795932277.7134407, 'info', 'message', 'no validation rows: the last step is kept', '{}');
INSERT INTO public.job_events VALUES (13, 'ftevent-3062b1a3e21c4bb3924253da', 'ftjob-8612b5e58f094b3f9db61a51', 1795932277.7134407, 'info', 'message', 'rows run packed behind one pass of the soft prompt', '{}');
INSERT INTO public.job_events VALUES (14, 'ftevent-8d1d6a364c5c4219b97cff0c', 'ftjob-8612b5e58f094b3f9db61a51', 1795932277.7580404, 'info', 'metrics', 'step 1 of 60, training loss 5.1090', '{"step": 1, "total_steps": 60, "train_loss": 5.1090420209444485, "learning_rate": 0.07751651466544163, "epoch": 0.5}');
INSERT INTO public.job_events VALUES (15, 'ftevent-e4eef3df3b5c48ffa77b7dc3', 'ftjob-8612b5e58f094b3f9db61a51', 1795932277.7644196, 'info', 'message', 'the job is paused', '{}');
INSERT INTO public.jobs VALUES ('ftjob-259719b097b84c1aa5b89cff', 'key-f757a2c9196adba721d8a4d1', 'succeeded', 'base', 'epochs-1', 'file-9d37177e6bed75424201e541909fd158', NULL, '{"train": {"virtual_tokens": 2, "reparameterisation": "residual-mlp", "bottleneck": 64, "init": "data", "init_text": null, "epochs": 1, "max_steps": null, "batch_rows": 4, "batch_tokens": null, "micro_batch_rows": null, "checkpoint_layers": false, "relative_learning_rate": null, "learning_rate": null, "schedule": "stable-decay", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": null, "eos": true, "eos_weight": 0.3, "validate_every": null, "best_by": "loss", "patience": null, "save_every": null, "seed": 1}, "metadata": null, "has_start": false, "base_fingerprint": "dce9db30739417e037f744569aafb3b20cecb8b9ba32b35c8d24e34f8f3ff79d"}', '{"trained_tokens": 68, "steps": 2, "total_steps": 2, "estimated_finish": null, "checkpoints": [{"id": "ftckpt-259719b097b84c1aa5b89cff-2", "step": 2, "model": "ft:base:epochs-1:ftjob-259719b097b84c1aa5b89cff:ckpt-step-2", "created": 1795932277.5534089, "metrics": {"step": 2, "train_loss": 5.190138311947093, "valid_loss": null, "full_valid_loss": null}}], "result_files": ["file-3b70e1991fb1cc530cbb3aad0f24f471"]}', 'ft:base:epochs-1:ftjob-259719b097b84c1aa5b89cff', 1795932277.4395661, 1795932277.446581, 1795932277.6430287);
INSERT INTO public.jobs VALUES ('ftjob-8612b5e58f094b3f9db61a51', 'key-f757a2c9196adba721d8a4d1', 'paused', 'base', 'epochs-30', 'file-9d37177e6bed75424201e541909fd158', NULL, '{"train": {"virtual_tokens": 2, "reparameterisation": "residual-mlp", "bottleneck": 64, "init": "data", "init_text": null, "epochs": 30, "max_steps": null, "batch_rows": 4, "batch_tokens": null, "micro_batch_rows": null, "checkpoint_layers": false, "relative_learning_rate": null, "learning_rate": null, "schedule": "stable-decay", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": null, "eos": true, "eos_weight": 0.3, "validate_every": null, "best_by": "loss", "patience": null, "save_every": null, "seed": 1}, "metadata": null, "has_start": false, "base_fingerprint": "dce9db30739417e037f744569aafb3b20cecb8b9ba32b35c8d24e34f8f3ff79d"}', '{"trained_tokens": 68, "steps": 2, "total_steps": 60, "estimated_finish": null, "checkpoints": [{"id": "ftckpt-8612b5e58f094b3f9db61a51-2", "step": 2, "model": "ft:base:epochs-30:ftjob-8612b5e58f094b3f9db61a51:ckpt-step-2", "created": 1795932277.7575946, "metrics": {"step": 2, "train_loss": 5.190138311947093, "valid_loss": null, "full_valid_loss": null}}]}', NULL, 1795932277.6508777, 1795932277.6589236, NULL);
INSERT INTO public.keys VALUES ('key-f757a2c9196adba721d8a4d1', 'ada', '9a74e3e05fa3d69f6b0e2c00cd98026e908a487c848e85b9249b929fdf0ba1a7', 'sp-8lvz', false, 1795932267.3627613, NULL, '{"requests_per_minute": null, "tokens_per_minute": null, "max_concurrent": null, "max_jobs": null}');
INSERT INTO public.keys VALUES ('key-754b7d7ef5d4662b3cf71144', 'root', 'c23b91b47033b61c0e441cf3070f1ecc399b499116d7bd63867ef5ed5e3f6e64', 'sp-37Xt', true, 1795932270.972324, NULL, '{"requests_per_minute": null, "tokens_per_minute": null, "max_concurrent": null, "max_jobs": null}');
INSERT INTO public.prompts VALUES ('prompt-48d59666accc4f0ea4803cb230afddc1', 'key-f757a2c9196adba721d8a4d1', 'coach', 'prompts/prompt-48d59666accc4f0ea4803cb230afddc1', 'upload', NULL, false, true, 1795932277.3719804);
INSERT INTO public.prompts VALUES ('prompt-166f83bc36ed4996bb57f7566cf42728', '', 'kept', NULL, 'library', NULL, true, true, 1795932264.046414);
INSERT INTO public.prompts VALUES ('prompt-be449c0dee89486790501f01f915df0d', '', 'gone', NULL, 'unloaded', NULL, true, false, 1795932264.0509791);
INSERT INTO public.prompts VALUES ('prompt-b06e3dd0451048938136bbd3e859efe1', 'key-f757a2c9196adba721d8a4d1', 'ft:base:epochs-1:ftjob-259719b097b84c1aa5b89cff:ckpt-step-2', 'prompts/prompt-b06e3dd0451048938136bbd3e859efe1', 'checkpoint', 'ftjob-259719b097b84c1aa5b89cff', false, false, 1795932277.5338845);
INSERT INTO public.prompts VALUES ('prompt-6df8851e8e5d48cfbf1efd5c1a152769', 'key-f757a2c9196adba721d8a4d1', 'ft:base:epochs-1:ftjob-259719b097b84c1aa5b89cff', 'prompts/prompt-6df8851e8e5d48cfbf1efd5c1a152769', 'job', 'ftjob-259719b097b84c1aa5b89cff', false, false, 1795932277.594224);
INSERT INTO public.prompts VALUES ('prompt-06ca27271b9049cab7872716dd92d1f9', 'key-f757a2c9196adba721d8a4d1', 'ft:base:epochs-30:ftjob-8612b5e58f094b3f9db61a51:ckpt-step-2', 'prompts/prompt-06ca27271b9049cab7872716dd92d1f9', 'checkpoint', 'ftjob-8612b5e58f094b3f9db61a51', false, false, 1795932277.7371895);
SELECT pg_catalog.setval('public.job_events_number_seq', 15, true);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.aliases
    ADD CONSTRAINT aliases_pkey PRIMARY KEY (owner, name);
ALTER TABLE ONLY public.files
    ADD CONSTRAINT files_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.job_events
    ADD CONSTRAINT job_events_id_key UNIQUE (id);
ALTER TABLE ONLY public.job_events
    ADD CONSTRAINT job_events_pkey PRIMARY KEY (number);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_hash_key UNIQUE (hash);
ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.prompts
    ADD CONSTRAINT prompts_owner_name_key UNIQUE (owner, name);
ALTER TABLE ONLY public.prompts
    ADD CONSTRAINT prompts_pkey PRIMARY KEY (id);
CREATE INDEX ix_files_owner ON public.files USING btree (owner);
CREATE INDEX ix_jobs_owner ON public.jobs USING btree (owner);
CREATE INDEX ix_prompts_job ON public.prompts USING btree (job);
CREATE INDEX ix_prompts_owner ON public.prompts USING btree (owner);
CREATE INDEX job_events_by_job ON public.job_events USING btree (job, number);
CREATE INDEX jobs_by_state ON public.jobs USING btree (status, created);
ALTER TABLE ONLY public.job_events
    ADD CONSTRAINT job_events_job_fkey FOREIGN KEY (job) REFERENCES public.jobs(id) ON DELETE CASCADE;
